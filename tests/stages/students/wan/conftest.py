"""Tiny Wan pipelines, made once."""

import pytest

from stages.demo.tiny_wan import build_tiny_wan
from stages.students.registry import read_configs

CAPTIONS = ("a red ellipse drifts to the right", "an ellipse over a grey texture")


@pytest.fixture(scope="session")
def wan_bases(tmp_path_factory):
    """Folders of a text-to-video and an image-to-video pipeline, by these names."""
    root = tmp_path_factory.mktemp("wan")
    for name in ("t2v", "i2v"):
        build_tiny_wan(root / name, captions=CAPTIONS, seed=0, image_to_video=name == "i2v")
    return {name: root / name for name in ("t2v", "i2v")}


@pytest.fixture(scope="session", params=["t2v", "i2v"])
def wan_configs(request, wan_bases):
    return read_configs(wan_bases[request.param])
