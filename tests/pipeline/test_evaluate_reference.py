"""`evaluate --reference`, and held-out clips as the reference, with tracks that need no SAM2."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from pipeline.cli import app
from stages.clips import load_clip, write_video
from stages.evaluate import evaluate as evaluation
from stages.evaluate import reference
from stages.sample_videos import batch
from stages.students import hub, sampler
from stages.video_scores.structure import SubjectTracks
from tests.fingerprints import fingerprint_of

TEXT = {"text": ArraySpec(dtype="float32", shape=(2, 3), dimension_names=("token", "channel"))}


SETTINGS = (
    *("evaluate.scores=[structure]", "evaluate.max_skipped=0"),
    *("data.num_frames=9", "data.height=32", "data.width=48"),
)


class BrightnessTracks:
    """Stands in for tracks: a token matches itself by its brightness; all are subject."""

    skipped: ClassVar[dict[str, str]] = {}

    def __init__(self, dataset, clips):
        self._tracks = {
            record.key: self._of(load_clip(record, clips).frames_THWC)
            for shard in dataset.shards
            for record in shard.records()
        }

    def _of(self, frames_THWC):
        tokens_THW = frames_THWC.reshape(9, 4, 8, 6, 8, 3).mean(axis=(2, 4, 5)) / 255
        similarities_PHWK = torch.zeros(8, 4, 6, 9)
        similarities_PHWK[..., 4] = torch.from_numpy(tokens_THW[:-1])
        masks = np.ones((9, 8, 12), bool)
        return SubjectTracks(
            forward_TMN=masks,
            backward_TMN=masks,
            valid_T=np.ones(9, bool),
            similarities_PHWK=similarities_PHWK,
            fps=8.0,
        )

    def __len__(self):
        return len(self._tracks)

    def tracks(self):
        return self._tracks.items()

    def read(self, key):
        return self._tracks.get(key)


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """Returns a function that runs the command."""

    def track(dataset, cache, extract, clips, **_):
        folders.append(cache.relative_to(tmp_path / "out" / "tracks").as_posix())
        return BrightnessTracks(dataset, clips)

    def run(*arguments):
        folders.clear()
        given = ["evaluate", *map(str, arguments), "--out", str(tmp_path / "out"), *SETTINGS]
        return CliRunner().invoke(app, given)

    folders = run.folders = []
    monkeypatch.setattr(reference, "track_videos", track)
    monkeypatch.setattr(evaluation, "track_videos", track)
    return run


def write(folder, **levels):
    """Videos of one brightness each, by key."""
    for key, level in levels.items():
        write_video(folder / f"{key}.mp4", np.full((9, 32, 48, 3), level, np.uint8), 8.0)
    return folder


def test_two_sides_are_measured_against_clips(evaluate, tmp_path):
    good = write(tmp_path / "good", **{"dog-0": 100, "cat-0": 50})
    bad = write(tmp_path / "bad", **{"dog-0": 200, "cat-0": 50})
    real = write(tmp_path / "real", **{"dog-5": 100, "cow-5": 50})
    done = evaluate(good, "--against", bad, "--reference", real)
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.replace("│", " ").split())
    assert "reference real 2 clips motion (MMD^2) of good none: needs tracks of 10" in shown
    assert "good: no flow_divergence of 1 videos (cat-0: real has no clip of its prompt)" in shown
    assert evaluate.folders == ["reference-real", "videos-good", "against-bad"]
    answer = json.loads(evaluate(good, "--against", bad, "--reference", real, "--json").stdout)
    assert answer["reference"]["clips"] == 2
    of_good, of_bad = answer["scores"]["flow_divergence"]["means"]
    assert of_good["mean"] == pytest.approx(0, abs=1e-12)
    assert of_bad["mean"] > 0.01
    assert (of_good["count"], of_good["missing"]) == (1, 1)


@pytest.fixture
def run_folder(fake_models, monkeypatch, tmp_path):
    """A run that holds out two clips of one caption; only its samples look like them."""

    def generate(model, requests, *, device, progress):
        for request in requests:
            level = {0: 50, 1: 50, 2: 150, 3: 150}[request.seed] + (model.run_dir is None) * 40
            yield np.full((9, 32, 48, 3), level / 255, np.float32)

    monkeypatch.setattr(batch, "generate_videos", generate)
    monkeypatch.setattr(hub, "resolve_base_model", lambda *_: None)
    clips = write(tmp_path / "clips", **{"walk/0": 50, "walk/1": 150, "walk/2": 250})
    for key in ("walk/0", "walk/1", "walk/2"):
        (clips / f"{key}.txt").write_text("a square")
    settings = StoreSettings(kind="text", arrays=TEXT, values={})
    writer = StoreWriter.open(tmp_path / "cache", settings, provenance={})
    with writer.shard("00000", source="00000.tar") as shard:
        for key in ("walk/0", "walk/1"):
            text = {"text": np.zeros((2, 3), np.float32)}
            shard.add(key, text, {"caption": "a square"}, fingerprint=fingerprint_of(key))
        shard.commit()
    writer.write_index()
    run = tmp_path / "runs" / "lgf"
    run.mkdir(parents=True)
    held_out = ["walk/0", "walk/1"]
    (run / "run.json").write_text(
        json.dumps({"settings": {}, "clip_digests": {}, "held_out": held_out})
    )
    return run


def sampled(evaluate, run, tmp_path, *arguments):
    return evaluate(
        *("--run", run, *arguments, "--json", f"cache={tmp_path / 'cache'}", "model.path=base"),
        *("sample.device=cpu", f"data.path={tmp_path / 'clips'}"),
    )


def test_videos_from_first_frames_are_compared_with_their_held_out_clips(
    evaluate, run_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(sampler, "takes_image", lambda _: True)
    done = sampled(evaluate, run_folder, tmp_path, "--against", "base", "--num", "2")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["reference"]["name"], answer["reference"]["clips"]) == ("held-out-clips", 2)
    of_run, of_base = answer["scores"]["flow_divergence"]["means"]
    assert (of_run["count"], of_base["count"]) == (4, 4)
    # Brightness differs by rounding of the compressed colours at most.
    assert of_run["mean"] < of_base["mean"] / 100
    uniform = answer["scores"]["uniform_divergence"]["means"]
    assert uniform[0]["mean"] == uniform[1]["mean"]


def test_videos_have_the_masks_of_their_held_out_clips(evaluate, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "takes_image", lambda _: True)
    for left in (8, 16):
        mask_HW = np.zeros((32, 48), np.uint8)
        mask_HW[8:24, left : left + 16] = 255
        Image.fromarray(mask_HW).save(tmp_path / "clips" / "walk" / "0.mask.png")
        done = sampled(evaluate, run_folder, tmp_path, "--against", "base")
        assert done.exit_code == 0, done.output
        placed = sorted((tmp_path / "out" / "videos").glob("*/*.mask.png"))
        assert [path.name for path in placed] == ["a square-0.mask.png"] * 2
        for path in placed:
            with Image.open(path) as opened:
                assert (np.asarray(opened) == mask_HW).all()


def test_a_mask_that_does_not_fit_its_image_stops_before_sampling(
    evaluate, run_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(batch, "generate_videos", None)
    for name, shape in (("dog.png", (32, 48)), ("dog.mask.png", (16, 48))):
        Image.fromarray(np.full(shape, 255, np.uint8)).save(tmp_path / name)
    (tmp_path / "p.csv").write_text("prompt,image\na square,dog.png\n")
    done = sampled(evaluate, run_folder, tmp_path, "--prompt-file", tmp_path / "p.csv")
    assert done.exit_code == 2
    assert "draw it at the image's own size" in " ".join(done.output.split())


def test_another_reference_replaces_the_held_out_clips(evaluate, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "takes_image", lambda _: True)
    real = write(tmp_path / "real", **{"cow-5": 50})
    done = sampled(evaluate, run_folder, tmp_path, "--reference", real)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["reference"]["name"] == "real"


def test_text_to_video_has_no_reference_of_its_own(evaluate, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "takes_image", lambda _: False)
    done = sampled(evaluate, run_folder, tmp_path)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["reference"] is None


def test_of_two_students_text_the_runs_own_is_read(evaluate, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "takes_image", lambda _: False)
    cache = tmp_path / "cache"
    (own,) = cache.glob("text-*")
    other = StoreSettings(kind="text", arrays=TEXT, values={"base": {"class": "another"}})
    StoreWriter.open(cache, other, provenance={}).write_index()
    assert sampled(evaluate, run_folder, tmp_path, "--against", "base").exit_code != 0
    record = json.loads((run_folder / "run.json").read_text())
    record["stores"] = {"text": {"folder": own.name, "settings_hash": ""}}
    (run_folder / "run.json").write_text(json.dumps(record))
    done = sampled(evaluate, run_folder, tmp_path, "--against", "base")
    assert done.exit_code == 0, done.output
