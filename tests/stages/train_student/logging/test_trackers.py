"""TensorBoard and Weights & Biases, read back from their files."""

import io
import sys
import types
from contextlib import closing

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stages.clips.video.encoding import write_video
from stages.train_student.logging import trackers as module
from stages.train_student.logging.trackers import Trackers, check_trackers


@pytest.fixture
def video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)
    write_video(tmp_path / "drawn.mp4", frames, 8.0)
    return tmp_path / "drawn.mp4"


def open_trackers(run_dir, *names, done=0):
    return Trackers(run_dir, names, steps_done=done, project="tests", settings={"train": {"a": 1}})


def test_curves_and_videos_reach_tensorboard_and_come_again_after_a_resume(video, tmp_path):
    with closing(open_trackers(tmp_path, "tensorboard")) as trackers:
        for step in (1, 2, 3):
            trackers.add_scalars(step, {"train/loss": 1.0 / step})
        trackers.flush()
    with closing(open_trackers(tmp_path, "tensorboard", done=1)) as trackers:
        trackers.add_scalars(2, {"train/loss": 5.0, "validation/diffusion": 6.0})
        trackers.add_video(2, "samples/0", video, "a dog & a cat")
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 1), (2, 5)]
    (image,) = read.Images("samples/0")
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert (gif.format, gif.n_frames, gif.size) == ("GIF", 5, (48, 32))
        assert gif.info["duration"] == pytest.approx(125, abs=10)
    (caption,) = read.Tensors("samples/0/caption/text_summary")
    assert caption.tensor_proto.string_val == [b"a dog & a cat"]


def test_wide_videos_are_shown_smaller(monkeypatch, video):
    monkeypatch.setattr(module, "_MAX_GIF_WIDTH", 24)
    data, height, width = module._to_gif(video)
    with Image.open(io.BytesIO(data)) as gif:
        assert gif.size == (width, height) == (24, 16)


def test_wandb_is_told_no_credentials(no_key, monkeypatch, tmp_path):
    told = {}

    class FakeRun:
        def define_metric(self, *_, **__):
            pass

    fake = types.SimpleNamespace(init=lambda **given: told.update(given) or FakeRun())
    fake.Settings = lambda **given: given
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for arguments, unsaid in (["cache=http://me:pw@host/c"], True), (["cache=c"], False):
        monkeypatch.setattr("sys.argv", ["train", *arguments])
        module._WandB(tmp_path, "tests", {"cache": "http://me:pw@host/c"})
        assert told["config"] == {"cache": "http://***@host/c"}
        assert told["settings"]["x_disable_meta"] is unsaid


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_a_resume_goes_on_in_the_same_run_of_wandb_and_nothing_leaves_the_machine(
    no_key, capfd, video, tmp_path
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for done in (0, 2):
        with closing(open_trackers(run_dir, "wandb", done=done)) as trackers:
            trackers.add_scalars(done + 1, {"train/loss": 1.0})
            trackers.add_video(done + 1, "samples/0", video, "a dog")
    name = (run_dir / "wandb" / "id").read_text()
    runs = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(f"-{name}" in run.name for run in runs)  # a number follows within one second
    assert not list((run_dir / "wandb").glob("run-*"))
    for run in runs:
        assert len(list((run / "files" / "media" / "videos" / "samples").glob("*.mp4"))) == 1
        assert (run / f"run-{name}.wandb").stat().st_size > 0
    assert capfd.readouterr().out == ""


def test_wandb_is_online_with_a_key_and_else_as_the_user_says(no_key, monkeypatch, tmp_path):
    assert module._wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert module._wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert module._wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert module._wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert module._wandb_mode() is None


def test_no_board_at_all_is_fine(video, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with closing(open_trackers(run_dir)) as trackers:
        trackers.add_scalars(1, {"train/loss": 1.0})
        trackers.add_video(1, "samples/0", video, "")
        trackers.flush()
    assert list(run_dir.iterdir()) == []


def test_a_board_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    check_trackers(("tensorboard", "wandb"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    check_trackers(("tensorboard",))
    with pytest.raises(ValueError, match=r"pip install 'sam2videox\[wandb\]'"):
        check_trackers(("tensorboard", "wandb"))
