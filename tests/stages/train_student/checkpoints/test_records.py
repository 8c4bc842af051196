"""What counts as a complete checkpoint, however its files were torn."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch

from stages.files.checksums import FileChecksum, checksum_of
from stages.train_student.checkpoints.records import (
    UNIVERSAL,
    Checkpoint,
    checkpoint_folder,
    complete_checkpoints,
    delete_checkpoint,
    find_damage,
    incomplete_checkpoints,
    keep_newest,
    own_files,
    read_record,
    record_path,
    why_incomplete,
    write_record,
)
from stages.train_student.parallel.process_group import World
from tests.synced_disk import SyncedDisk

FILES = {"mp_rank_00_model_states.pt": b"weights", "zero/rank_0.pt": b"", "rank_1.pt": b"moments"}


def write_checkpoint(root, step, *, recorded=True):
    folder = checkpoint_folder(root, step)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = {name: checksum_of(folder / name) for name in FILES}
    checkpoint = Checkpoint(
        folder=folder, step=step, world_size=2, zero_stage=3, planned_steps=9, files=files
    )
    if recorded:
        write_record(checkpoint)
    return checkpoint


def change_record(**changes):
    """A record whose own checksum fits what it says."""

    def change(folder):
        write_record(replace(read_record(folder), **changes))

    return change


def replace_in_record(old, new):
    def change(folder):
        text = record_path(folder).read_text()
        assert old in text
        record_path(folder).write_text(text.replace(old, new))

    return change


TEARS = {
    "no record": lambda folder: record_path(folder).unlink(),
    "record half written": lambda folder: os.truncate(record_path(folder), 30),
    "record empty": lambda folder: os.truncate(record_path(folder), 0),
    "record of an endless step": change_record(step=float("inf")),
    "record of a step of 30 digits": change_record(step=10**30),
    "record of files that are none": lambda folder: record_path(folder).write_text(
        '{"crc32c": "00000000", "step": 1, "world_size": 1, "zero_stage": 1, "planned_steps": 1, '
        '"files": [[]]}'
    ),
    "record nested deep": lambda folder: record_path(folder).write_text(
        '{"a":' * 900 + "1" + "}" * 900
    ),
    "record of no object": lambda folder: record_path(folder).write_text("[]"),
    "record without checksums": lambda folder: record_path(folder).write_text(
        json.dumps({"step": 20, "world_size": 2, "files": {n: len(c) for n, c in FILES.items()}})
    ),
    "record of other sizes": change_record(files=dict.fromkeys(FILES, FileChecksum(3, "0" * 8))),
    "record of no files": change_record(files={}),
    "record of a step that is no number": change_record(step="twenty"),
    "a digit of the record changed": replace_in_record('"zero_stage": 3', '"zero_stage": 2'),
    "a checksum of the record changed": replace_in_record('"00000000"', '"00000001"'),
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
    assert complete_checkpoints(tmp_path) == [before]
    assert why_incomplete(torn.folder) is not None
    assert incomplete_checkpoints(tmp_path) == ([torn.folder] if torn.folder.is_dir() else [])


def test_newest_is_by_steps_not_by_name(tmp_path):
    steps = (900, 1000, 20)
    for step in steps:
        write_checkpoint(tmp_path, step)
    assert [found.step for found in complete_checkpoints(tmp_path)] == [1000, 900, 20]
    assert complete_checkpoints(tmp_path / "none") == []


def test_keeping_drops_old_ones_and_leftovers_but_nothing_that_was_once_complete(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 5, recorded=False)
    (checkpoint_folder(tmp_path, 2) / "rank_1.pt").write_bytes(b"other length")
    write_checkpoint(tmp_path / UNIVERSAL, 1)
    write_checkpoint(tmp_path / UNIVERSAL, 4)
    keep_newest(tmp_path, 2, 4)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/"))
    assert left == ["checkpoint-2", "checkpoint-3", "checkpoint-4", UNIVERSAL]
    assert [found.step for found in complete_checkpoints(tmp_path)] == [4, 3]
    assert [found.step for found in complete_checkpoints(tmp_path / UNIVERSAL)] == [4]


def test_the_best_checkpoint_is_kept_in_addition_to_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    keep_newest(tmp_path, 2, 4, best=4)
    assert [found.step for found in complete_checkpoints(tmp_path)] == [4, 3]
    keep_newest(tmp_path, 1, 4, best=3)
    assert [found.step for found in complete_checkpoints(tmp_path)] == [4, 3]


def test_later_checkpoints_neither_push_out_earlier_ones_nor_go(tmp_path):
    """They were damaged, if a run resumed from an earlier one."""
    for step in (1, 2, 3, 9):
        write_checkpoint(tmp_path, step)
    keep_newest(tmp_path, 1, 3)
    assert [found.step for found in complete_checkpoints(tmp_path)] == [9, 3]


ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def test_a_flipped_bit_is_found_and_its_file_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 3)
    assert find_damage(checkpoint, ALONE) is None
    file = checkpoint.folder / "rank_1.pt"
    file.write_bytes(b"momentr")
    assert complete_checkpoints(tmp_path) == [checkpoint], "sizes are those of the record"
    expected = r"^rank_1.pt has the CRC-32C [0-9a-f]{8}, its record says [0-9a-f]{8}$"
    assert re.match(expected, find_damage(checkpoint, ALONE))
    file.unlink()
    assert "rank_1.pt cannot be read (No such file" in find_damage(checkpoint, ALONE)


def test_checksums_are_crc_32c(tmp_path):
    """The check value that catalogues of CRCs give for CRC-32/ISCSI."""
    (tmp_path / "file").write_bytes(b"123456789")
    assert checksum_of(tmp_path / "file") == FileChecksum(9, "e3069283")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_file_is_read_by_one_rank_and_by_the_one_that_wrote_it(size):
    names = ["mp_rank_00_model_states.pt", "zero/transformer.x/fp32.pt", "zero/y/exp_avg.pt"]
    names += [f"bf16_zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in range(3)]
    names += [f"weight_average_rank_{n:05d}.safetensors" for n in range(3)]
    ranks = [World(rank=n, local_rank=0, size=size, device=ALONE.device) for n in range(size)]
    shares = [own_files(names, rank) for rank in ranks]
    assert sorted(name for share in shares for name in share) == sorted(names)
    if size >= 3:
        for rank in range(3):
            assert {names[3 + rank], names[6 + rank]} <= set(shares[rank])


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
        delete_checkpoint(old.folder)
    monkeypatch.undo()
    whole = [new, old] if kill_at == 1 else [new]
    assert complete_checkpoints(tmp_path) == whole
    assert record_path(old.folder).exists() == (kill_at == 1)
    keep_newest(tmp_path, 1, 2)
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
    disk.check_tree(record_path(newest.folder), "at the end")
    assert disk.not_synced == []
