"""Evaluation from end to end with the tiny SAM2: values, resuming, unusable videos, the files."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cache_schema import StoreReader
from stages.clips import encode_video, read_video
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluate import compare_sides
from stages.evaluate.output import write_evaluation
from stages.video_scores.appearance import appearance_scores
from stages.video_scores.groups import SCORES
from stages.video_scores.structure import SubjectTracks, structure_scores


def test_scores_are_those_of_the_stored_tracks_and_the_decoded_frames(videos, score, tmp_path):
    folder = videos("a", "dog-0", "dog-1")
    found = score(folder).values
    assert found.keys() == {"dog-0", "dog-1"}
    (masks,) = (tmp_path / "tracks" / "a").glob("masks-*")
    (flow,) = (tmp_path / "tracks" / "a").glob("gram_flow-*")
    for key, values in found.items():
        stored = StoreReader(masks).read(key)
        tracks = SubjectTracks(
            forward_TMN=stored["forward"] / 255 > 0.5,
            backward_TMN=stored["backward"] / 255 > 0.5,
            valid_T=stored["valid"].astype(bool),
            similarities_PHWK=torch.from_numpy(
                StoreReader(flow).read(key)["gram_flow"].astype(np.float32)
            ),
            fps=8.0,
        )
        frames, _ = read_video(folder / f"{key}.mp4")
        expected = structure_scores(tracks, temperature=0.1) | appearance_scores(frames)
        np.testing.assert_equal(values, expected)


def test_a_second_run_tracks_nothing_and_writes_the_same_files(
    videos, score, tmp_path, monkeypatch
):
    sides = [videos("a", "dog-0", "dog-1"), videos("b", "dog-0", "dog-1", seed=1)]
    config = EvaluateConfig()

    def write(out):
        evaluation = compare_sides([score(side) for side in sides], config)
        write_evaluation(evaluation, out, settings={"fps": 8.0}, made_with={})
        return {path.name: path.read_bytes() for path in out.iterdir()}

    first = write(tmp_path / "out")
    monkeypatch.setattr(
        "stages.extract_features.teacher.extraction.SubjectExtraction.load_model", None
    )
    assert write(tmp_path / "again") == first
    assert first.keys() == {"scores.jsonl", "scores.csv", "summary.json", "index.html"}


def test_a_video_that_was_replaced_is_tracked_again(videos, score):
    folder = videos("a", "dog-0", "dog-1")
    before = score(folder).values
    videos("a", "dog-0", seed=3)
    after = score(folder).values
    assert before["dog-1"] == after["dog-1"]
    assert before["dog-0"]["flow_entropy"] != after["dog-0"]["flow_entropy"]


def test_a_video_whose_mask_was_replaced_is_tracked_again(videos, score):
    folder = videos("a", "dog-0", "dog-1")
    before = score(folder).values
    moved_HW = np.zeros((32, 48), np.uint8)
    moved_HW[20:30, 2:12] = 255
    Image.fromarray(moved_HW).save(folder / "dog-0.mask.png")
    after = score(folder).values
    assert before["dog-1"] == after["dog-1"]
    assert before["dog-0"]["flow_entropy"] != after["dog-0"]["flow_entropy"]


def test_the_rate_of_the_training_maps_does_not_change_scores(videos, score, extract_config):
    folder = videos("a", "dog-0")
    teacher = extract_config.teacher.model_copy(update={"time_rate": "latent"})
    latent = extract_config.model_copy(update={"teacher": teacher})
    assert score(folder, extract=latent).values == score(folder).values


def test_unusable_videos_are_named_and_do_not_count(videos, score, draw_frames):
    folder = videos("a", "dog-0")
    (folder / "broken-1.mp4").write_bytes(b"no video")
    (folder / "short-2.mp4").write_bytes(encode_video(draw_frames(3, 32, 48), 8.0))
    scored = score(folder)
    assert scored.problems.keys() == {"broken-1", "short-2"}
    assert "undecodable" in scored.problems["broken-1"]
    assert "too_short: 3 frames" in scored.problems["short-2"]
    assert scored.values["broken-1"] == {}
    assert "contrast" in scored.values["short-2"]
    evaluation = compare_sides([scored], EvaluateConfig())
    (contrast,) = evaluation.means["contrast"]
    assert (contrast.count, contrast.missing) == (2, 1)
    assert evaluation.skipped_share == pytest.approx(2 / 3)


def test_files_say_the_same(videos, score, tmp_path):
    sides = [videos("a", "dog-0", "dog-1", "cat-0"), videos("b", "dog-1", "cat-0", "owl-0", seed=1)]
    config = EvaluateConfig(scores=("appearance",))
    evaluation = compare_sides([score(side, config) for side in sides], config)
    assert [(one.key, other.key) for one, other in evaluation.pairs] == [
        ("cat-0", "cat-0"),
        ("dog-1", "dog-1"),
    ]
    assert evaluation.unpaired == ("dog-0", "owl-0")
    page = write_evaluation(evaluation, tmp_path / "out", settings={}, made_with={"version": "1"})
    rows = [json.loads(line) for line in (page.parent / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * len(SCORES["appearance"])
    with (page.parent / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        for one in rows:
            if (one["side"], one["video"]) == (row["side"], row["video"]):
                assert float(row[one["score"]]) == one["value"]
    summary = json.loads((page.parent / "summary.json").read_text())
    contrast = {(row["side"], row["video"]): float(row["contrast"]) for row in table}
    found = summary["scores"]["contrast"]
    for number, name in enumerate("ab"):
        of_prompt: dict[str, list[float]] = {}
        for (side, video), value in contrast.items():
            if side == name:
                of_prompt.setdefault(video.split("-")[0], []).append(value)
        means = [math.fsum(values) / len(values) for values in of_prompt.values()]
        expected = math.fsum(means) / len(means)
        assert found["means"][number]["mean"] == pytest.approx(expected, rel=1e-12)
    differences = [contrast["a", key] - contrast["b", key] for key in ("cat-0", "dog-1")]
    assert found["difference"]["difference"]["mean"] == pytest.approx(sum(differences) / 2)
    assert summary["made_with"] == {"version": "1"}


def test_the_page_shows_every_pair_and_escapes_prompts(videos, score, tmp_path):
    sides = [videos("a & b", "<i>dog-0"), videos("c", "<i>dog-0", seed=1)]
    config = EvaluateConfig(scores=("appearance",))
    evaluation = compare_sides([score(side, config) for side in sides], config)
    page = write_evaluation(evaluation, tmp_path / "out", settings={}, made_with={})
    text = page.read_text()
    assert "<i>dog" not in text
    assert "&lt;i&gt;dog (seed 0)" in text
    for folder in ("a%20%26%20b", "c"):
        assert f'src="../{folder}/%3Ci%3Edog-0.mp4"' in text


def test_sides_without_any_track_are_compared_all_the_same(videos, score, tmp_path):
    sides = [videos("a", "dog-0"), videos("b", "dog-0", seed=1)]
    for side in sides:
        (side / "dog-0.mp4").write_bytes(b"no video")
    evaluation = compare_sides([score(side) for side in sides], EvaluateConfig())
    assert evaluation.motion.value is None
    assert evaluation.skipped_share == 1
    write_evaluation(evaluation, tmp_path / "out", settings={}, made_with={})


def test_a_video_without_a_figure_has_its_other_scores(videos, score):
    scored = score(videos("a", "dog-0"), EvaluateConfig(scores=("figures", "vbench", "appearance")))
    assert "names no biped" in scored.problems["dog-0"]
    assert {"temporal_flickering", "contrast"} <= scored.values["dog-0"].keys()
    assert "limb_presence" not in scored.values["dog-0"]


def test_sides_in_folders_of_one_name_have_their_own_vbench_files(videos, score, tmp_path):
    sides = [videos("one/run", "dog-0"), videos("two/run", "dog-0", seed=1)]
    config = EvaluateConfig(scores=("vbench",))
    scored = [score(side, config) for side in sides]
    first, second = (replace(one.side, name=name) for name, one in zip("xy", scored, strict=True))
    named = [replace(scored[0], side=first), replace(scored[1], side=second)]
    out = tmp_path / "out"
    write_evaluation(compare_sides(named, config), out, settings={}, made_with={})
    assert {path.name for path in out.glob("*_eval*")} == {
        "x_eval_results.json",
        "y_eval_results.json",
    }


def test_a_video_that_lacks_scores_and_a_partner_counts_once(videos, score):
    sides = [videos("a", "dog-0", "cat-0"), videos("b", "cat-0", seed=1)]
    (sides[0] / "dog-0.mp4").write_bytes(b"no video")
    config = EvaluateConfig(scores=("appearance",))
    evaluation = compare_sides([score(side, config) for side in sides], config)
    assert evaluation.skipped_share == pytest.approx(1 / 3)


def test_a_side_without_any_value_has_no_mean(videos, score):
    folder = videos("a", "dog-0")
    (folder / "dog-0.mp4").write_bytes(b"no video")
    evaluation = compare_sides([score(folder)], EvaluateConfig())
    assert all(mean.count == 0 for (mean,) in evaluation.means.values())
