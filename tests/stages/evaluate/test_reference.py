"""Reference clips: their layouts, which clip shows a video's scene, and distances to them."""

import json
import tarfile
from pathlib import Path

import pytest

from stages.clips import ClipsConfig
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluate import compare_sides
from stages.evaluate.output import write_evaluation
from stages.evaluate.reference import NoSceneError, held_out_reference, open_reference
from stages.evaluate.videos import Video
from stages.sample_videos.requests import PromptRow

CLIPS = ClipsConfig(path=Path("unused"), num_frames=9, height=32, width=48, fps=8.0)


@pytest.fixture
def folder(tmp_path):
    """Returns a function that makes a folder of empty videos with the files beside them."""

    def make(*keys, **texts):
        root = tmp_path / "real"
        for key in keys:
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{key}.mp4").write_bytes(b"")
        for name, text in texts.items():
            stem, _, suffix = name.rpartition("_")
            (root / f"{stem}.{suffix}").write_text(text)
        return root

    return make


def video(prompt, number=0, key="generated"):
    return Video(key=key, path=Path(f"{key}.mp4"), prompt=prompt, number=number)


def test_captions_come_from_files_beside_the_videos_or_from_names(folder):
    root = folder(
        *("one", "two", "three", "deep/four", "a dog-3"),
        one_txt="a cat\n",
        two_json=json.dumps({"prompt": "a cow", "seed": 7}),
        three_json=json.dumps({"caption": "a hen"}),
    )
    assert open_reference(root, CLIPS).captions == {
        "one": "a cat",
        "two": "a cow",
        "three": "a hen",
        "deep/four": None,
        "a dog-3": "a dog",
    }


def test_a_dataset_of_another_layout_is_read(folder, tmp_path):
    (folder("one") / "metadata.jsonl").write_text('{"file_name": "one.mp4", "caption": "a cat"}')
    assert open_reference(tmp_path / "real", CLIPS).captions == {"one": "a cat"}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        tar.add(folder("two", two_txt="a dog") / "two.mp4", "two.mp4")
        tar.add(tmp_path / "real" / "two.txt", "two.txt")
    assert open_reference(tmp_path / "00000.tar", CLIPS).captions == {"00000/two": "a dog"}


def test_a_clip_is_found_by_its_caption(folder):
    reference = open_reference(folder("one", "two", one_txt="a cat", two_txt="a dog"), CLIPS)
    assert [reference.clip_of(video("a dog", seed)) for seed in (0, 5)] == ["two", "two"]


def test_clips_of_one_caption_are_told_apart_by_the_number(folder):
    reference = open_reference(folder("a dog-0", "a dog-1"), CLIPS)
    assert reference.clip_of(video("a dog", 1)) == "a dog-1"
    with pytest.raises(NoSceneError, match=r"2 clips of its prompt, such as a dog-0 and a dog-1"):
        reference.clip_of(video("a dog", 2))


def test_a_number_in_a_name_of_another_text_is_not_a_seed(folder):
    root = folder("clip-0", "clip-1", **{"clip-0_txt": "a dog", "clip-1_txt": "a dog"})
    with pytest.raises(NoSceneError, match="2 clips of its prompt"):
        open_reference(root, CLIPS).clip_of(video("a dog", 1))


def test_equal_names_in_two_folders_cannot_be_told_apart(folder):
    reference = open_reference(folder("x/a dog-0", "y/a dog-0"), CLIPS)
    with pytest.raises(NoSceneError, match="2 clips of its prompt"):
        reference.clip_of(video("a dog", 0))


def test_a_video_without_a_prompt_has_the_clip_of_its_name(folder):
    reference = open_reference(folder("one", "deep/two"), CLIPS)
    assert reference.clip_of(video(None, None, key="deep/two")) == "deep/two"
    with pytest.raises(NoSceneError, match="real has no clip of its name"):
        reference.clip_of(video(None, None, key="two"))
    with pytest.raises(NoSceneError, match="real has no clip of its prompt"):
        reference.clip_of(video("a dog"))


def test_held_out_clips_are_found_by_the_seeds_of_their_videos(folder):
    root = folder("one", "two", "three", **dict.fromkeys(("one_txt", "two_txt", "three_txt"), "x"))
    rows = {"three": PromptRow(prompt="a dog", seed=5), "one": PromptRow(prompt="a dog", seed=7)}
    reference = held_out_reference(rows, CLIPS.model_copy(update={"path": root}), num=2)
    found = [reference.clip_of(video("a dog", seed)) for seed in (5, 6, 7, 8)]
    assert found == ["three", "three", "one", "one"]
    with pytest.raises(NoSceneError):
        reference.clip_of(video("a dog", 9))
    records = [record.key for shard in reference.dataset.shards for record in shard.records()]
    assert records == ["one", "three"]


@pytest.mark.parametrize(
    ("make", "message"), [(False, "does not exist"), (True, "holds no videos")]
)
def test_a_reference_without_clips_is_refused(tmp_path, make, message):
    if make:
        (tmp_path / "real").mkdir()
    with pytest.raises(ValueError, match=f"no reference clips at .*real: .*{message}"):
        open_reference(tmp_path / "real", CLIPS)


def test_each_side_has_a_distance_to_the_reference(videos, score, track, tmp_path):
    real = videos("real", "dog-0", "cat-0")
    (real / "broken-1.mp4").write_bytes(b"no video")
    sides = [score(videos(name, "dog-0", seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    reference = track(real)
    evaluation = compare_sides(sides, EvaluateConfig(), reference)
    out = tmp_path / "out"
    page = write_evaluation(evaluation, out, settings={}, made_with={}).read_text()
    summary = json.loads((out / "summary.json").read_text())["reference"]
    assert (summary["name"], summary["clips"]) == ("real", 3)
    assert "undecodable" in summary["problems"]["broken-1"]
    note = "needs tracks of 10 videos and of as many reference clips, got 1 and 2"
    assert summary["distances"] == {
        "motion (MMD^2)": [{"value": None, "standard_error": None, "note": note}] * 2
    }
    assert "Distances to the reference real (3 clips)" in page
    assert page.count(note) == 2


def test_clips_that_are_gone_do_not_count(videos, track):
    real = videos("real", "one-0", "two-0")
    assert track(real).motion.keys() == {"one-0", "two-0"}
    (real / "one-0.mp4").unlink()
    assert track(real).motion.keys() == {"two-0"}


def test_videos_are_compared_with_the_clip_of_their_scene(videos, score, track, tmp_path):
    real = videos("real", "dog-0", "cat-0", "owl-0")
    side = videos("a", "dog-0", "cat-1", "fox-0")
    (side / "bad-0.mp4").write_bytes(b"no video")
    (real / "owl-0.mp4").write_bytes(b"no video")
    videos("a", "owl-0", seed=1)
    reference = track(real)
    scored = score(side, reference=reference)
    # Both are drawn as their clips are; with one clip of a prompt, the seed does not matter.
    assert scored.values["dog-0"]["flow_divergence"] == pytest.approx(0, abs=1e-12)
    assert scored.values["cat-1"]["flow_divergence"] == pytest.approx(0, abs=1e-12)
    for key in ("dog-0", "cat-1"):
        assert scored.values[key]["uniform_divergence"] > 0
    assert scored.unmatched.keys() == {"fox-0", "owl-0"}
    assert scored.unmatched["fox-0"] == "real has no clip of its prompt"
    assert "clip owl-0 of real has no track: undecodable" in scored.unmatched["owl-0"]
    evaluation = compare_sides([scored], EvaluateConfig(), reference)
    (mean,) = evaluation.means["flow_divergence"]
    assert (mean.count, mean.missing) == (2, 3)
    assert evaluation.skipped_share == pytest.approx(1 / 5), "a video may be without a clip"
    out = tmp_path / "out"
    page = write_evaluation(evaluation, out, settings={}, made_with={}).read_text()
    assert "no flow_divergence: real has no clip of its prompt" in page
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sides"][0]["unmatched"] == scored.unmatched
    assert summary["scores"]["flow_divergence"]["means"][0]["count"] == 2
    rows = map(json.loads, (out / "scores.jsonl").read_text().splitlines())
    of_fox = {row["score"]: row for row in rows if row["video"] == "fox-0"}
    assert of_fox["flow_divergence"]["problem"] == scored.unmatched["fox-0"]
    assert of_fox["contrast"]["problem"] is None


def test_a_video_that_differs_from_its_clip_diverges(videos, score, track):
    reference = track(videos("real", "dog-0"))
    scored = score(videos("a", "dog-0", seed=5), reference=reference)
    assert scored.values["dog-0"]["flow_divergence"] > 1e-6


def test_a_clip_of_another_size_is_not_compared(videos, score, track):
    larger = CLIPS.model_copy(update={"height": 64, "width": 96})
    reference = track(videos("real", "dog-0", height=64, width=96), clips=larger)
    scored = score(videos("a", "dog-0"), reference=reference)
    assert "8 pairs of 2x3 tokens" in scored.unmatched["dog-0"]
    assert "the reference clip's 8 pairs of 4x6 tokens" in scored.unmatched["dog-0"]


def test_without_a_reference_there_is_no_divergence(videos, score):
    scored = score(videos("a", "dog-0"))
    evaluation = compare_sides([scored], EvaluateConfig())
    assert "flow_divergence" not in evaluation.means
    assert not scored.unmatched


def test_a_second_run_tracks_no_clip_again(videos, score, track, tmp_path, monkeypatch):
    real, side = videos("real", "dog-0", "cat-0"), videos("a", "dog-0", seed=1)

    def write(out):
        reference = track(real)
        evaluation = compare_sides([score(side, reference=reference)], EvaluateConfig(), reference)
        write_evaluation(evaluation, out, settings={}, made_with={})
        return {path.name: path.read_bytes() for path in out.iterdir()}

    first = write(tmp_path / "out")
    monkeypatch.setattr(
        "stages.extract_features.teacher.extraction.SubjectExtraction.load_model", None
    )
    assert write(tmp_path / "again") == first


def test_a_dataset_in_tars_is_a_reference(two_shards, track):
    clips = two_shards.model_copy(update={"path": Path("unused")})
    found = track(two_shards.path, clips=clips)
    assert len(found.motion) == 5
    assert found.problems.keys() == {"00001/clip004"}
