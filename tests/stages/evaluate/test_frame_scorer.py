"""Scores of frames that are kept on disk: what is computed again, and what is not."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.clips import VideoError, read_video, write_video
from stages.evaluate import frame_scorer
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.frame_scorer import FrameScorer
from stages.evaluate.videos import Video
from stages.video_scores.appearance import appearance_scores
from stages.video_scores.vbench.networks import VBenchNetworks

APPEARANCE = EvaluateConfig(scores=("appearance",))


@pytest.fixture
def video(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise, 8.0)
    return Video(key="a", path=tmp_path / "a.mp4", prompt="a dog", number=0)


@pytest.fixture
def computed(monkeypatch):
    """The videos that were decoded."""
    decoded = []
    monkeypatch.setattr(
        frame_scorer, "read_video", lambda path: decoded.append(path.name) or read_video(path)
    )
    return decoded


def test_scores_are_computed_once_and_read_as_they_were(video, computed, tmp_path):
    first = FrameScorer(tmp_path / "kept", APPEARANCE).score(video)
    assert first.values == appearance_scores(read_video(video.path)[0])
    assert FrameScorer(tmp_path / "kept", APPEARANCE).score(video) == first
    assert computed == ["a.mp4"]


def test_missing_values_and_reasons_are_kept(video, computed, tmp_path):
    config = EvaluateConfig(scores=("figures", "vbench"))
    still = replace(video, path=tmp_path / "one.mp4")
    write_video(still.path, np.zeros((1, 16, 16, 3), np.uint8), 8.0)
    for _ in range(2):
        found = FrameScorer(tmp_path / "kept", config).score(still)
        assert math.isnan(found.values["temporal_flickering"])
        assert "a dog" in found.problem
        assert found.protocol == "VBench"
    assert computed == ["one.mp4"]


@pytest.mark.parametrize("what", ["bytes", "prompt", "groups", "networks", "device", "code"])
def test_what_changes_a_score_computes_it_again(video, computed, tmp_path, monkeypatch, what):
    FrameScorer(tmp_path / "kept", APPEARANCE).score(video)
    config, networks = APPEARANCE, VBenchNetworks(device=torch.device("cpu"))
    if what == "bytes":
        video.path.write_bytes(video.path.read_bytes() + b"\0")
    elif what == "prompt":
        video = replace(video, prompt=None)
    elif what == "groups":
        config = EvaluateConfig(scores=("appearance", "vbench"))
    elif what == "networks":
        networks = replace(networks, sha256="0" * 64)
    elif what == "device":
        networks = replace(networks, device=torch.device("cuda"))
    else:
        monkeypatch.setattr(frame_scorer, "_source_code", lambda: "changed")
    FrameScorer(tmp_path / "kept", config, networks).score(video)
    assert computed == ["a.mp4", "a.mp4"]


def test_a_renamed_video_is_not_computed_again(video, computed, tmp_path):
    FrameScorer(tmp_path / "kept", APPEARANCE).score(video)
    moved = video.path.rename(tmp_path / "b.mp4")
    FrameScorer(tmp_path / "kept", APPEARANCE).score(replace(video, path=moved))
    assert computed == ["a.mp4"]


def test_a_video_that_cannot_be_decoded_leaves_nothing(video, tmp_path):
    video.path.write_bytes(b"no video")
    with pytest.raises(VideoError):
        FrameScorer(tmp_path / "kept", APPEARANCE).score(video)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "content", ["", "[]", json.dumps({"values": {"sharpness": "1"}, "protocol": "VBench"})]
)
def test_a_damaged_file_is_named(video, tmp_path, content):
    FrameScorer(tmp_path / "kept", APPEARANCE).score(video)
    (file,) = (tmp_path / "kept").rglob("*.json")
    file.write_text(content)
    with pytest.raises(ValueError, match=file.name):
        FrameScorer(tmp_path / "kept", APPEARANCE).score(video)
