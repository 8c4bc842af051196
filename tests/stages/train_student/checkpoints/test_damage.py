"""Checkpoints whose bytes changed after they were written, and checkpoints that hold code."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from stages.files.checksums import checksum_of, files_below
from stages.train_student.checkpoints.export import export_checkpoint
from stages.train_student.checkpoints.records import (
    UNIVERSAL,
    checkpoint_folder,
    delete_checkpoint,
    read_record,
    write_record,
)

SETTINGS = {"checkpoint_every": 1, "checkpoints_kept": 9, "report_to": ()}


@pytest.fixture(scope="module")
def made(train, tmp_path_factory):
    """A run of three steps with a checkpoint after each."""
    run = tmp_path_factory.mktemp("made") / "run"
    train(run, steps=3, **SETTINGS)
    return run


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, which may be damaged."""
    return shutil.copytree(made, tmp_path / "run")


def zero_moments(folder):
    """512 bytes of the optimizer's states."""
    (file,) = folder.glob("*optim_states.pt")
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(512))
    return file.name


def flip_exponent(folder):
    """One bit of one weight."""
    file = folder / "mp_rank_00_model_states.pt"
    weights = torch.load(file, weights_only=True, mmap=True)["module"]
    value = next(value for value in weights.values() if value.numel() > 64)
    content = bytearray(file.read_bytes())
    at = content.index(value.numpy().tobytes()) + 3
    content[at] ^= 0x20
    file.write_bytes(content)
    return file.name


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "losses.jsonl").open()]


@pytest.mark.parametrize("damage", [zero_moments, flip_exponent])
def test_resuming_passes_over_a_damaged_checkpoint_and_says_so(made, run, train, lines, damage):
    name = damage(checkpoint_folder(run / "checkpoints", 3))
    summary = train(run, steps=4, progress=lines, **SETTINGS)
    assert summary.resumed_from == 2
    assert losses(run)[:3] == losses(made)
    (told,) = [line for line in lines.lines if line.startswith("skipping")]
    assert f"checkpoint-3: it is damaged: {name} has the CRC-32C" in told
    (used,) = [line for line in lines.lines if "instead" in line]
    assert "checkpoint-2 instead" in used


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(run, train, lines):
    for step in (1, 2, 3):
        zero_moments(checkpoint_folder(run / "checkpoints", step))
    before = losses(run)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact \(.*point-1.*restore"):
        train(run, steps=4, progress=lines, **SETTINGS)
    assert losses(run) == before


@pytest.mark.parametrize("damage", [zero_moments, flip_exponent])
def test_exporting_a_damaged_checkpoint_fails_and_another_can_be_named(run, tmp_path, damage):
    name = damage(checkpoint_folder(run / "checkpoints", 3))
    for step in (None, 3):
        with pytest.raises(ValueError, match=rf"checkpoint-3 is damaged: {name} .* of 3, 2, 1"):
            export_checkpoint(run, step, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_checkpoint(run, 2, tmp_path / "out").step == 2


def test_all_ranks_pass_over_what_one_of_them_finds_damaged(train_ranks, tmp_path):
    settings = {"processes": 2, "deepspeed": {"zero_stage": 3}, **SETTINGS}
    run = tmp_path / "run"
    answer = train_ranks(run, steps=2, **settings)
    assert not any(answer.codes)
    file = checkpoint_folder(run / "checkpoints", 2) / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    answer = train_ranks(run, steps=3, **settings)
    assert not any(answer.codes), answer.errors
    assert [told["resumed_from"] for told in answer.told] == [1, 1]
    assert any(f"damaged: {file.name} has the CRC" in line for line in answer.told[0]["lines"])


def test_a_damaged_universal_copy_is_made_again(run, train, lines):
    checkpoint = read_record(checkpoint_folder(run / "checkpoints", 3))
    write_record(replace(checkpoint, world_size=2))
    assert train(run, steps=4, **SETTINGS).resumed_from == 3
    (run / "finished.json").unlink()
    delete_checkpoint(checkpoint_folder(run / "checkpoints", 4))
    victim = next((run / "checkpoints" / UNIVERSAL / "checkpoint-3").glob("zero/*/exp_avg.pt"))
    sound = victim.read_bytes()
    victim.write_bytes(sound[:-100] + bytes(100))
    assert train(run, steps=4, progress=lines, **SETTINGS).resumed_from == 3
    assert victim.read_bytes() == sound
    assert any("again, which is damaged: exp_avg.pt" in line for line in lines.lines)


class Code:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def hide_code(checkpoint, pattern, made_by_code):
    """Put code into a checkpoint's file, with a record that fits."""
    (file,) = checkpoint.folder.glob(pattern)
    content = torch.load(file, weights_only=False)
    torch.save(content | {"code": Code(made_by_code)}, file)
    files = {name: checksum_of(path) for name, path in files_below(checkpoint.folder).items()}
    write_record(replace(checkpoint, files=files))


@pytest.mark.parametrize("file", ["*optim_states.pt", "*model_states.pt"])
def test_code_in_a_checkpoint_is_refused_and_not_run(run, train, tmp_path, file):
    hide_code(read_record(checkpoint_folder(run / "checkpoints", 3)), file, tmp_path / "ran")
    with pytest.raises(ValueError, match=r"names posix.mkdir, .* was not loaded\. Use another"):
        train(run, steps=4, **SETTINGS)
    assert not (tmp_path / "ran").exists()
    if "model" in file:  # the optimizer's states are not loaded for an export
        with pytest.raises(ValueError, match=r"names posix\.mkdir"):
            export_checkpoint(run, 3, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["*optim_states.pt", "*model_states.pt"])
def test_code_is_not_run_where_a_checkpoint_is_shared_out_anew(run, train, tmp_path, file):
    checkpoint = replace(read_record(checkpoint_folder(run / "checkpoints", 3)), world_size=2)
    hide_code(checkpoint, file, tmp_path / "ran")
    with pytest.raises(ValueError, match=r"names posix\.mkdir"):
        train(run, steps=4, **SETTINGS)
    assert not (tmp_path / "ran").exists()


def test_the_environment_cannot_make_checkpoints_run_code(run, train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoint = read_record(checkpoint_folder(run / "checkpoints", 3))
    hide_code(checkpoint, "*optim_states.pt", tmp_path / "ran")
    with pytest.raises(ValueError, match=r"names posix\.mkdir"):
        train(run, steps=4, **SETTINGS)
    assert not (tmp_path / "ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
