"""Tiny Wan pipelines, made once."""

import pytest

from stages.demo.tiny_wan import build_tiny_wan
from stages.students.registry import read_configs
from tests.stages.two_transformers import write_two_transformers

CAPTIONS = ("a red ellipse drifts to the right", "an ellipse over a grey texture")


@pytest.fixture(scope="session")
def wan_bases(tmp_path_factory):
    """Folders of a text-to-video and an image-to-video pipeline, by these names."""
    root = tmp_path_factory.mktemp("wan")
    for name in ("t2v", "i2v"):
        build_tiny_wan(root / name, captions=CAPTIONS, seed=0, image_to_video=name == "i2v")
    return {name: root / name for name in ("t2v", "i2v")}


@pytest.fixture(scope="session")
def two_bases(wan_bases, tmp_path_factory):
    """As `wan_bases`, with two transformers each."""
    root = tmp_path_factory.mktemp("two")
    return {
        name: write_two_transformers(
            wan_bases["t2v"],
            root / name,
            image_to_video=name == "i2v",
            boundary_ratio={"t2v": 0.875, "i2v": 0.9}[name],
        )
        for name in ("t2v", "i2v")
    }


@pytest.fixture(scope="session", params=["t2v", "i2v"])
def wan_configs(request, wan_bases):
    return read_configs(wan_bases[request.param])
