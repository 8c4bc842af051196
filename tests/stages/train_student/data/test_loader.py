"""Loader processes: what they send, and how a run ends when one of them dies or is stuck."""

import faulthandler
import multiprocessing
import os
import signal
import time
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from pathlib import Path

import pytest
import torch

from cache_schema import StoreUnreachable
from stages.train_student.data import loader
from stages.train_student.data.dataset import Batch
from stages.train_student.data.loader import BatchLoader


class Made:
    """Samples made from their number; `at` does something at one of them."""

    def __init__(self, at=None, act=None):
        self.at, self.act = at, act

    def __getitem__(self, sample):
        if sample == self.at:
            self.act()
        tensor = torch.arange(1000.0)[None] + sample
        return Batch(
            keys=(str(sample),),
            clean_BFCHW=tensor,
            noise_BFCHW=-tensor,
            timestep_B=torch.tensor([sample]),
            text_BLD=tensor.half(),
            image_BFCHW=None,
            teacher={"features": torch.full((1, 3, 5), sample, dtype=torch.int8)},
            teacher_valid_BT=torch.ones(1, 3, dtype=torch.bool),
            masks={"none": torch.empty(1, 0, dtype=torch.uint8)},
            num_frames=9,
        )


def load(samples=None, batches=6, **changes):
    numbers = [[number] for number in range(batches)]
    settings = {"workers": 2, "start": "fork", "pin_memory": False} | changes
    return BatchLoader(samples or Made(), numbers, **settings)


def signalled(number):
    def act():
        faulthandler.disable()  # it would print where the worker is
        os.kill(os.getpid(), number)

    return act


def mapped():
    return Path("/proc/self/maps").read_text()


def test_without_memory_files_batches_travel_by_files_that_have_no_name(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)  # as on macOS
    with load() as batches:
        firsts = [float(batch.clean_BFCHW.flatten()[0]) for batch in batches]
    with load(workers=0) as batches:
        assert firsts == [float(batch.clean_BFCHW.flatten()[0]) for batch in batches]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux alone has memory files")
def test_batches_lie_in_memory_that_is_no_file_of_dev_shm():
    before = mapped()
    with load() as batches:
        first = next(batches)
        assert "/memfd:batch" in mapped() and "/memfd:batch" not in before
        assert mapped().count("/dev/shm/") == before.count("/dev/shm/")
    first.clean_BFCHW[0, 0] = 7.0  # the memory outlives its loader, and can be written
    assert first.clean_BFCHW[0, :2].tolist() == [7.0, 1.0]
    assert first.teacher["features"].dtype == torch.int8
    assert first.masks["none"].shape == (1, 0)
    del first
    assert "/memfd:batch" not in mapped()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_dies_ends_the_reading(number):
    with load(Made(at=2, act=signalled(number))) as batches:
        assert [next(batches).keys for _ in range(2)] == [("0",), ("1",)]
        with pytest.raises(ChildProcessError, match=rf"{number.name}.*loader_workers=0"):
            next(batches)


def test_a_worker_that_is_stopped_ends_the_reading_within_the_limit(monkeypatch):
    monkeypatch.setattr(loader, "SILENCE_PER_CLIP_S", 0.5)
    started = time.monotonic()
    with load(Made(at=1, act=signalled(signal.SIGSTOP))) as batches:
        next(batches)
        with pytest.raises(TimeoutError, match=r"sent nothing for 0.5 s.*loader_workers=0"):
            next(batches)
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 60  # the test's own patience; `close` kills


def test_an_interpreter_that_exits_does_not_wait_for_a_stopped_worker():
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        batches = load(Made(at=0, act=signalled(signal.SIGSTOP)))
        _exit_function()  # what multiprocessing does at exit
        os._exit(0 if batches else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_errors_of_a_worker_are_raised_as_they_are():
    def unreachable():
        raise StoreUnreachable("the bucket did not answer")

    def odd():
        class OddError(Exception):
            pass

        raise OddError("cannot be pickled")

    def wrong():
        raise ZeroDivisionError("in a sample")

    with load(Made(at=0, act=unreachable)) as batches:
        with pytest.raises(StoreUnreachable, match=r"^the bucket did not answer$") as found:
            next(batches)
        assert not hasattr(found.value, "__notes__")
        assert next(batches).keys == ("1",)
    with (
        load(Made(at=0, act=odd)) as batches,
        pytest.raises(RuntimeError, match="OddError in a loader"),
    ):
        next(batches)
    with load(Made(at=0, act=wrong)) as batches, pytest.raises(ZeroDivisionError) as found:
        next(batches)
    assert "test_loader.py" in found.value.__notes__[0]


def test_signals_to_the_whole_group_leave_the_workers_at_work():
    with load(batches=12) as batches:
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        assert len(list(batches)) == 11


def test_workers_end_with_a_training_process_that_is_killed():
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        batches = load()
        pids = " ".join(str(worker.pid) for worker in multiprocessing.active_children())
        os.write(tell, f"{pids}\n".encode())
        os.close(tell)
        next(batches)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(tell)
    with os.fdopen(told) as pipe:
        # Workers hold the pipe's end too: it ends once all of them are gone.
        line, rest = pipe.readline(), pipe.read()
    os.waitpid(child, 0)
    assert len(line.split()) == 2 and rest == ""


def test_batches_are_pinned_ahead_by_a_thread(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    with load(pin_memory=True) as batches:
        assert [int(batch.timestep_B) for batch in batches] == [1, 2, 3, 4, 5, 6]
    with load(Made(at=1, act=signalled(signal.SIGKILL)), pin_memory=True) as batches:
        next(batches)
        with pytest.raises(ChildProcessError):
            next(batches)
