"""Checkpoints and exports that the disk has no room for."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from stages.train_student.checkpoints import export, weights
from stages.train_student.checkpoints.records import complete_checkpoints

Usage = namedtuple("Usage", ("total", "used", "free"))
SETTINGS = {"steps": 3, "checkpoint_every": 1, "report_to": (), "ema": {"decay": 0.9}}


def torch_finds_no_room(patch):
    """A device that refuses every byte: what torch says of it is torch's own."""
    save = torch.save

    def save_to_full_disk(content, file, **options):
        full = "checkpoint-2" in str(file) and "optim" in str(file)
        return save(content, "/dev/full" if full else file, **options)

    patch.setattr(torch, "save", save_to_full_disk)


def safetensors_finds_no_room(patch):
    def fail(tensors, path, metadata):
        if "checkpoint-2" in str(path):
            raise SafetensorError("Error while serializing: I/O error: os error 28")
        save(tensors, path, metadata)

    from stages.train_student.parallel import ema

    save = ema.save_tensors
    patch.setattr(ema, "save_tensors", fail)


def sync_finds_no_room(patch):
    sync = os.fsync

    def fail(descriptor):
        if "checkpoint-2" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    patch.setattr(os, "fsync", fail)


@pytest.mark.parametrize(
    "no_room", [torch_finds_no_room, safetensors_finds_no_room, sync_finds_no_room]
)
def test_a_full_disk_is_told_with_what_is_left_and_the_run_can_go_on(
    train, tmp_path, monkeypatch, lines, no_room
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="checkpoint") as raised:
        no_room(patch)
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 0))
        train(run, **SETTINGS)
    (complete,) = complete_checkpoints(run / "checkpoints")
    size = sum(path.stat().st_size for path in complete.folder.iterdir()) / 1e9
    assert str(raised.value) == (
        f"the checkpoint {run}/checkpoints/checkpoint-2 could not be written: No space left on "
        f"device (0.00 GB are free on that disk); checkpoint-1 has {size:.2f} GB and is complete: "
        "the same command resumes after step 1. The disk needs room for one checkpoint more than "
        "train.checkpoints_kept"
    )
    assert train(run, progress=lines, **SETTINGS).resumed_from == 1
    assert any("checkpoint-2: it is incomplete" in line for line in lines.lines)


def test_other_errors_while_saving_stay_what_they_are(train, tmp_path, monkeypatch):
    def fail(content, file, **options):
        raise RuntimeError("a collective failed")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match=r"^a collective failed$"):
        train(tmp_path, **SETTINGS)


def test_an_export_that_does_not_fit_is_told_with_its_folder(train, tmp_path, monkeypatch):
    train(tmp_path / "run", steps=1, method="full", report_to=())

    def fail(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: os error 28")

    monkeypatch.setattr(weights, "save_tensors", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 0))
    with pytest.raises(OSError, match=r"export .*/out could not be written: No space left"):
        export.export_checkpoint(tmp_path / "run", None, tmp_path / "out")
