"""What counts as a complete checkpoint, however its files were torn."""

import json
import os

import pytest

from stages.train_student.checkpoints.records import (
    UNIVERSAL,
    Checkpoint,
    clear,
    complete_checkpoints,
    folder_of,
    keep_newest,
    newest_complete,
    record_of,
    torn_checkpoints,
    write_record,
)
from tests.synced_disk import SyncedDisk

FILES = {"mp_rank_00_model_states.pt": b"weights", "zero/rank_0.pt": b"", "rank_1.pt": b"moments"}


def write_checkpoint(root, step, *, recorded=True):
    folder = folder_of(root, step)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    checkpoint = Checkpoint(folder=folder, step=step, world_size=2, zero_stage=3, planned_steps=9)
    if recorded:
        write_record(checkpoint)
    return checkpoint


def change_record(**changes):
    def change(folder):
        record = record_of(folder)
        record.write_text(json.dumps(json.loads(record.read_text()) | changes))

    return change


TEARS = {
    "no record": lambda folder: record_of(folder).unlink(),
    "record half written": lambda folder: os.truncate(record_of(folder), 30),
    "record empty": lambda folder: os.truncate(record_of(folder), 0),
    "record of no object": lambda folder: record_of(folder).write_text("[]"),
    "record without the stage": lambda folder: record_of(folder).write_text(
        json.dumps({"step": 20, "world_size": 2, "files": {n: len(c) for n, c in FILES.items()}})
    ),
    "record of other sizes": change_record(files=dict.fromkeys(FILES, 3)),
    "record of no files": change_record(files={}),
    "record of a step that is no number": change_record(step="twenty"),
    "a file missing": lambda folder: (folder / "rank_1.pt").unlink(),
    "an empty file missing": lambda folder: (folder / "zero" / "rank_0.pt").unlink(),
    "a file truncated": lambda folder: os.truncate(folder / "rank_1.pt", 3),
    "a file too long": lambda folder: (folder / "rank_1.pt").write_bytes(b"momentss"),
    "a file too many": lambda folder: (folder / "rank_2.pt").write_bytes(b""),
    "the folder missing": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "a file in its place": lambda folder: (
        folder.rename(folder.with_name("elsewhere")),
        folder.write_bytes(b""),
    ),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_not_complete_and_the_one_before_is_the_newest(tmp_path, tear):
    before, torn = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 20)
    assert complete_checkpoints(tmp_path) == [torn, before]
    TEARS[tear](torn.folder)
    assert newest_complete(tmp_path) == before
    assert torn_checkpoints(tmp_path) == ([torn.folder] if torn.folder.is_dir() else [])


def test_newest_is_by_steps_not_by_name(tmp_path):
    steps = (900, 1000, 20)
    for step in steps:
        write_checkpoint(tmp_path, step)
    assert [found.step for found in complete_checkpoints(tmp_path)] == [1000, 900, 20]
    assert newest_complete(tmp_path / "none") is None


def test_keeping_drops_old_ones_and_leftovers_but_nothing_that_was_once_complete(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 5, recorded=False)
    (folder_of(tmp_path, 2) / "rank_1.pt").write_bytes(b"other length")
    write_checkpoint(tmp_path / UNIVERSAL, 1)
    write_checkpoint(tmp_path / UNIVERSAL, 4)
    keep_newest(tmp_path, 2)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/"))
    assert left == ["checkpoint-2", "checkpoint-3", "checkpoint-4", UNIVERSAL]
    assert [found.step for found in complete_checkpoints(tmp_path)] == [4, 3]
    assert [found.step for found in complete_checkpoints(tmp_path / UNIVERSAL)] == [4]


@pytest.mark.parametrize("kill_at", range(1, 5))
def test_what_dies_while_a_checkpoint_is_removed_never_leaves_a_record(
    tmp_path, monkeypatch, kill_at
):
    old, new = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    left, unlink = [kill_at], os.unlink

    def die_in_time(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return unlink(*arguments, **options)

    monkeypatch.setattr(os, "unlink", die_in_time)
    with pytest.raises(KeyboardInterrupt):
        clear(old.folder)
    monkeypatch.undo()
    whole = [new, old] if kill_at == 1 else [new]
    assert complete_checkpoints(tmp_path) == whole
    assert record_of(old.folder).exists() == (kill_at == 1)
    keep_newest(tmp_path, 1)
    assert sorted(tmp_path.glob("*/")) == [new.folder]


class CheckpointDisk(SyncedDisk):
    """Checks a checkpoint before its completion record is published."""

    def before_publishing(self, target):
        if target.name.endswith(".complete.json"):
            self.check_tree(target.with_name(target.name.removesuffix(".complete.json")), "then")


def test_a_checkpoint_is_on_the_disk_before_its_record(train, tmp_path, monkeypatch):
    disk = CheckpointDisk(tmp_path)
    disk.watch(monkeypatch)
    train(tmp_path / "run", steps=2, checkpoint_every=1, checkpoints_kept=1)
    (newest,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    disk.check_tree(record_of(newest.folder), "at the end")
    assert disk.not_synced == []
