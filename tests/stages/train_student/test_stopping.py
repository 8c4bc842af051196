"""Trainings that are asked to stop, or whose cache turns out damaged."""

import json
import signal
import time
from dataclasses import replace

import pytest

from stages.train_student import train as training
from stages.train_student.data.dataset import CachedSamples, DamagedClip
from stages.train_student.guards import DamagedClipGuard, TooManyDamaged
from stages.train_student.logging.rows import DamagedRow
from stages.train_student.parallel.process_group import World
from tests.stages.train_student import faulty_steps as faulty


def losses(run_dir):
    return (run_dir / "losses.jsonl").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_asked_to_stop_keeps_its_last_step(
    train, lines, monkeypatch, tmp_path, number
):
    settings = {"steps": 4, "checkpoint_every": 9}
    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    train(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(
            training, "_train_step", faulty.asked_to_stop(training._train_step, 1, number)
        )
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", progress=lines, **settings)
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before
    assert "stopped after step 2" in lines.lines[-1]
    assert train(tmp_path / "stopped", **settings).resumed_from == 2
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_request_at_the_last_step_lets_the_run_finish(train, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "_train_step", faulty.asked_to_stop(training._train_step, 1))
    assert train(tmp_path, steps=2).steps_done == 2
    assert (tmp_path / "finished.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_ranks_stop_when_one_is_asked_to(train_ranks, tmp_path):
    settings = {"processes": 2, "steps": 4, "checkpoint_every": 9}
    for name, fault in (("whole", ""), ("stopped", "ask rank 1 to stop at 1"), ("stopped", "")):
        answer = train_ranks(tmp_path / name, spoil=fault, **settings)
        assert answer.codes == ([1, 1] if fault else [0, 0]), answer.errors
    assert (answer.told[0]["steps"], answer.told[0]["resumed_from"]) == (4, 2)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "told"),
    [("kill", "killed by SIGKILL"), ("stop", "sent nothing for 3 s")],
)
def test_all_ranks_end_when_the_loader_of_one_does(train_ranks, tmp_path, fault, told):
    """No launcher is there to end the other rank."""
    answer = train_ranks(
        tmp_path,
        processes=2,
        steps=6,
        loader_workers=1,
        spoil=f"{fault} loader of rank 1 at sample 5",
    )
    assert 0 not in answer.codes and None not in answer.codes, answer.codes
    assert told in "".join(answer.errors)
    assert answer.seconds < 120


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_launcher_that_is_stopped_leaves_a_checkpoint(train_process, tmp_path):
    """SIGTERM to torchrun, as a scheduler sends it, at any moment of the training."""
    settings = {"processes": 2, "steps": 2000, "checkpoint_every": 5000}
    process = train_process(tmp_path, **settings)
    rows = tmp_path / "losses.jsonl"
    deadline = time.monotonic() + 200
    while not (rows.is_file() and rows.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    (record,) = (tmp_path / "checkpoints").glob("*.complete.json")
    assert json.loads(record.read_text())["step"] == rows.read_text().count("\n"), errors


def damaged_at(read, samples):
    """`CachedSamples.__getitem__` that tells of a damaged clip at these samples."""

    def read_damaged(self, sample):
        batch = read(self, sample)
        if sample not in samples:
            return batch
        told = DamagedClip(key=samples[sample], message="its checksum differs", gone=False)
        return replace(batch, damaged=(told,))

    return read_damaged


def test_damaged_clips_are_told_once_and_written_each_time(train, lines, monkeypatch, tmp_path):
    samples = {0: "clip/9", 1: "clip/9", 4: "clip/9"}
    read = damaged_at(CachedSamples.__getitem__, samples)
    monkeypatch.setattr(CachedSamples, "__getitem__", read)
    summary = train(tmp_path, steps=3, max_damaged=0.2, progress=lines)
    assert summary.damaged_clips == 1
    rows = [json.loads(line) for line in (tmp_path / "damaged_clips.jsonl").open()]
    assert [(row["step"], row["key"]) for row in rows] == [
        (1, "clip/9"),
        (1, "clip/9"),
        (3, "clip/9"),
    ]
    told = [line for line in lines.lines if line.startswith("warning")]
    assert told == [
        "warning: clip 'clip/9' cannot be read, using another instead: its checksum differs; "
        "run sam2vx-pipeline cache repair after the run"
    ]


def test_too_many_damaged_clips_stop_the_run(train, monkeypatch, tmp_path):
    read = damaged_at(CachedSamples.__getitem__, {2: "clip/8", 3: "clip/9"})
    monkeypatch.setattr(CachedSamples, "__getitem__", read)
    with pytest.raises(TooManyDamaged, match=r"2 of 5 clips .*max_damaged=0.3 .*cache verify"):
        train(tmp_path, steps=4, max_damaged=0.3)
    assert len(losses(tmp_path).splitlines()) == 2
    assert not (tmp_path / "finished.json").exists()


def test_the_share_of_damaged_clips_counts_each_once():
    world = World(rank=0, local_rank=0, size=1, device=None)
    damaged = DamagedClipGuard(clips=100, max_fraction=0.02, world=world)
    for step in range(5):
        damaged.add((DamagedRow(step=step, key="a", message="", gone=False),))
    damaged.add((DamagedRow(step=6, key="b", message="", gone=False),))
    for key in "cdefg":
        damaged.add((DamagedRow(step=6, key=key, message="dropped", gone=True),))
    with pytest.raises(TooManyDamaged, match="3 of 100 clips"):
        damaged.add((DamagedRow(step=7, key="c", message="", gone=False),))
