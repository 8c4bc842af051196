"""Batches of videos: resumed, partly failed, compared."""

import json

import numpy as np
import pytest
import torch

from stages.clips import read_video
from stages.progress import SilentProgress
from stages.sample_videos import batch as module
from stages.sample_videos.batch import (
    default_folder,
    generate_batch,
    open_batch,
    write_comparisons,
)
from stages.sample_videos.outputs import OtherVideoError
from stages.sample_videos.requests import VideoRequest
from stages.sample_videos.sample import open_video_model

CPU = torch.device("cpu")
QUIET = SilentProgress()
REQUESTS = [VideoRequest(prompt=text, seed=seed) for text in ("a dog", "a cat") for seed in (0, 1)]


@pytest.fixture
def model(config, base, clips):
    return open_video_model(config, base, clips, run_dir=None)


@pytest.fixture
def drawn(monkeypatch):
    """Stands in for the models: the requests that were drawn, as videos of one brightness."""
    requests = []

    def generate(video_model, asked, *, device, progress):
        for request in asked:
            requests.append(request)
            size = video_model.size
            value = np.nan if request.prompt == "a nan" else len(request.prompt) / 10
            yield np.full((size.num_frames, size.height, size.width, 3), value, np.float32)

    monkeypatch.setattr(module, "generate_videos", generate)
    return requests


def fill(batch):
    generate_batch(
        batch, device=CPU, about={"model": "https://user:secret@hub/base"}, progress=QUIET
    )
    return batch


def test_only_missing_videos_are_drawn(model, drawn, tmp_path):
    fill(open_batch(model, REQUESTS[:2], tmp_path))
    again = fill(open_batch(model, REQUESTS, tmp_path))
    assert drawn == REQUESTS
    assert [output.request for output in again.missing] == REQUESTS[2:]
    assert list(again.seconds) == [output.video for output in again.missing]
    assert not open_batch(model, REQUESTS, tmp_path).missing


def test_a_batch_that_is_stopped_keeps_what_it_has(model, drawn, tmp_path, monkeypatch):
    written = module.Output.write

    def stop(output, *arguments):
        if output.request == REQUESTS[2]:
            raise KeyboardInterrupt
        written(output, *arguments)

    monkeypatch.setattr(module.Output, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        fill(open_batch(model, REQUESTS, tmp_path))
    monkeypatch.undo()
    assert [one.request for one in open_batch(model, REQUESTS, tmp_path).missing] == REQUESTS[2:]


def test_the_record_says_how_each_was_made(model, drawn, tmp_path):
    (output,) = fill(open_batch(model, REQUESTS[:1], tmp_path)).outputs
    record = json.loads(output.record.read_text())
    assert record["made_from"] == model.made_from(REQUESTS[0])
    assert (record["run"], record["device"], record["prompt"]) == (None, "cpu", "a dog")
    assert "secret" not in record["model"]


def test_one_video_that_is_not_finite_does_not_stop_the_others(model, drawn, tmp_path):
    requests = [REQUESTS[0], VideoRequest(prompt="a nan", seed=0), REQUESTS[2]]
    batch = fill(open_batch(model, requests, tmp_path))
    assert list(batch.seconds) == [tmp_path / "a dog-0.mp4", tmp_path / "a cat-0.mp4"]
    (problem,) = batch.problems.items()
    assert problem[0] == tmp_path / "a nan-0.mp4"
    assert "NaN or infinite" in problem[1]
    assert not problem[0].exists()
    with pytest.raises(ValueError, match="NaN or infinite"):
        fill(open_batch(model, requests, tmp_path))


def test_settings_have_folders_of_their_own(config, base, clips, tmp_path, model):
    other = open_video_model(config.model_copy(update={"steps": 3}), base, clips, run_dir=None)
    folders = {default_folder(tmp_path, one) for one in (model, other)}
    assert len(folders) == 2
    assert all(folder.name.startswith("base-") for folder in folders)


def test_a_folder_that_takes_no_file_is_told_before_any_work(model, drawn, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        open_batch(model, REQUESTS, tmp_path / "file")
    assert not drawn


class TestComparisons:
    @pytest.fixture
    def sides(self, config, base, clips, lora_run, drawn, tmp_path):
        runs = (lora_run("lgf"), None)

        def make(steps=2, requests=REQUESTS):
            changed = config.model_copy(update={"steps": steps})
            models = [open_video_model(changed, base, clips, run_dir=run) for run in runs]
            return [fill(open_batch(one, requests, tmp_path / one.name)) for one in models]

        return make

    def compare(self, sides, *, overwrite=False):
        return write_comparisons(*sides, overwrite=overwrite, progress=QUIET)

    def test_pairs_stand_in_a_folder_named_after_both(self, sides, tmp_path):
        paths = self.compare(sides())
        assert paths[0] == tmp_path / "lgf-vs-base" / "a dog-0.mp4"
        frames_THWC, _ = read_video(paths[0])
        assert frames_THWC.shape[2] == 2 * 48 + 4
        assert len(paths) == len(REQUESTS)

    def test_what_is_there_is_kept(self, sides):
        first, *_ = self.compare(sides())
        before = first.stat().st_mtime_ns
        self.compare(sides())
        assert first.stat().st_mtime_ns == before

    def test_other_videos_are_never_taken_for_these(self, sides, tmp_path):
        """A comparison of videos that have been made anew since."""
        self.compare(sides())
        old = tmp_path / "lgf"
        for folder in (old, tmp_path / "base"):
            for file in folder.iterdir():
                file.unlink()
        changed = sides(steps=3)
        with pytest.raises(OtherVideoError, match="exists, with left"):
            self.compare(changed)
        assert len(self.compare(changed, overwrite=True)) == len(REQUESTS)

    def test_a_side_with_a_problem_is_left_out(self, sides):
        requests = [REQUESTS[0], VideoRequest(prompt="a nan", seed=0), REQUESTS[2]]
        assert [path.name for path in self.compare(sides(requests=requests))] == [
            "a dog-0.mp4",
            "a cat-0.mp4",
        ]
