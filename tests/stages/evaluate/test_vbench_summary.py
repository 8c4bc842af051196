"""What an evaluation says of VBench's dimensions, and its files in VBench's form."""

import json
import math

import numpy as np
import pytest
import torch

from stages.clips import write_video
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluate import compare_sides, score_side
from stages.evaluate.frame_scorer import FrameScorer
from stages.evaluate.output import summary_of, write_evaluation
from stages.evaluate.vbench_summary import VBenchMeasured, vbench_summary
from stages.evaluate.videos import open_side
from stages.progress import SilentProgress
from stages.video_scores.vbench.config import VBenchConfig
from stages.video_scores.vbench.networks import VBenchNetworks

ALL = {"dino": "a", "clip": "b", "raft": "c", "amt": "d", "dinov2": "e", "dreamsim": "f"}
VALUES = {
    "subject_consistency": 0.9,
    "background_consistency": 0.9,
    "temporal_flickering": 0.9,
    "motion_smoothness": 0.9,
    "dynamic_degree": 1.0,
}
OF_VALUES = (
    (0.9 - 0.1462) / (1 - 0.1462)
    + (0.9 - 0.2615) / (1 - 0.2615)
    + (0.9 - 0.6293) / (1 - 0.6293)
    + (0.9 - 0.706) / (0.9975 - 0.706)
    + 0.5
) / 4.5


def side(name="lgf", *values, protocols=None):
    values = values or (VALUES,)
    return VBenchMeasured(
        name=name, values=values, protocols=protocols or ["VBench-Long"] * len(values)
    )


def summary(*sides, config=ALL, has_subject_motion=True):
    return vbench_summary(sides, VBenchConfig(**config), has_subject_motion=has_subject_motion)


def note_with(found, text):
    (note,) = (note for note in found.notes if text in note)
    return note


def test_the_mean_of_the_five_is_over_the_videos_with_a_value():
    moving = VALUES | {"temporal_flickering": math.nan, "dynamic_degree": 0.0}
    found = summary(side("lgf", VALUES, moving))
    expected = OF_VALUES - 0.5 * 0.5 / 4.5
    assert found.sides[0].five_dimension_mean == pytest.approx(expected)
    assert "no value for 1 of 2 videos of lgf" in note_with(found, "temporal_flickering")
    assert note_with(found, "not the quality score of VBench's board")


@pytest.mark.parametrize("dimension", VALUES)
def test_there_is_no_mean_of_four(dimension):
    found = summary(side("lgf", {**VALUES, dimension: math.nan}))
    assert found.as_dict()["sides"][0]["five_dimension_mean"] is None
    assert dict(found.rows)["five VBench dimensions, weighted mean"] == "none"
    assert not [note for note in found.notes if "quality score" in note]


def test_missing_networks_are_told_in_one_line():
    found = summary(side("lgf", {"temporal_flickering": 0.9}), config={"clip": "b"})
    note = note_with(found, "without a network")
    for dimension, setting in (
        ("subject_consistency", "dino"),
        ("motion_smoothness", "amt"),
        ("dynamic_degree", "raft"),
    ):
        assert f"{dimension} (evaluate.vbench.{setting})" in note
    assert "background_consistency" not in note
    within = note_with(found, "within pieces of 2 s only")
    assert "background_consistency (evaluate.vbench.dreamsim)" in within
    assert "subject_consistency" not in within
    assert "evaluate.vbench.raft" in note_with(found, "temporal_flickering is of all videos")


def test_short_videos_need_no_network_between_pieces():
    found = summary(side(protocols=["VBench"]), config={"dino": "a", "raft": "c"})
    assert not [note for note in found.notes if "pieces" in note]


def test_the_camera_is_named_beside_dynamic_degree():
    assert "is beside it" in note_with(summary(side()), "moving camera")
    alone = summary(side(), has_subject_motion=False)
    assert "with structure in evaluate.scores" in note_with(alone, "moving camera")
    assert not [n for n in summary(side(), config={}).notes if "camera" in n]


def test_protocols_within_a_side_are_not_mixed():
    found = summary(side("lgf", VALUES, VALUES, protocols=["VBench", "VBench-Long"]))
    assert math.isnan(found.sides[0].five_dimension_mean)
    assert found.sides[0].protocol is None
    note = note_with(found, "mixes")
    assert "VBench for 1 videos, VBench-Long for 1 videos" in note


def test_sides_of_different_protocols_are_told():
    found = summary(side("lgf"), side("base", protocols=["VBench"]))
    assert "lgf VBench-Long, base VBench" in note_with(found, "cannot be compared")
    assert dict(found.rows)["VBench protocol"] == "VBench-Long against VBench"
    same = summary(side("lgf"), side("base"))
    assert not [note for note in same.notes if "compared" in note]


class TestFiles:
    """From videos to files, with networks that see colours."""

    NETWORKS = VBenchNetworks(
        device=torch.device("cpu"),
        dino=lambda frames: frames.mean(dim=(2, 3)),
        flow=lambda first, _: torch.full_like(first[:, :2], 9.0),
    )
    CONFIG = EvaluateConfig(
        scores=("vbench",), vbench=VBenchConfig.model_validate({"dino": "a", "raft": "b"})
    )

    @pytest.fixture
    def evaluate(self, extract_config, tmp_path):
        def run(**frames):
            folder = tmp_path / "lgf"
            noise = np.random.default_rng(0)
            for key, count in frames.items():
                video_THWC = noise.integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)
                write_video(folder / f"{key}-0.mp4", video_THWC, 8.0)
            scored = score_side(
                open_side("lgf", folder),
                self.CONFIG,
                extract_config,
                None,
                cache=tmp_path / "tracks",
                frames=FrameScorer(tmp_path / "frame-scores", self.CONFIG, self.NETWORKS),
                temperature=0.1,
                provenance={},
                progress=SilentProgress(),
            )
            evaluation = compare_sides([scored], self.CONFIG)
            page = write_evaluation(evaluation, tmp_path / "out", settings={}, made_with={})
            return evaluation, page

        return run

    def test_videos_of_one_protocol_have_vbenchs_files(self, evaluate):
        _, page = evaluate(dog=41, cat=40)
        results = json.loads((page.parent / "lgf_eval_results.json").read_text())
        assert results.keys() == {"subject_consistency", "dynamic_degree"}
        assert results["dynamic_degree"][0] == 1.0
        info = json.loads((page.parent / "lgf_full_info.json").read_text())
        assert [one["prompt_en"] for one in info] == ["cat", "dog"]
        assert info[0]["dimension"] == ["subject_consistency", "dynamic_degree"]
        (path,) = info[0]["video_list"]
        assert path == results["dynamic_degree"][1][0]["video_path"]
        summary = json.loads((page.parent / "summary.json").read_text())["vbench"]
        assert summary["sides"] == [
            {"name": "lgf", "protocols": {"VBench-Long": 2}, "five_dimension_mean": None}
        ]
        text = page.read_text()
        assert "VBench protocol: VBench-Long" in text
        assert "moving camera" in text

    def test_mixed_videos_have_none(self, evaluate):
        evaluation, page = evaluate(dog=41, cat=9)
        assert not list(page.parent.glob("lgf_*.json"))
        assert summary_of(evaluation)["vbench"]["sides"][0]["protocols"] == {
            "VBench": 1,
            "VBench-Long": 1,
        }
        assert "mixes VBench&#x27;s protocols" in page.read_text()
