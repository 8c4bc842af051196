"""Background threads: a stuck thread ends the work after a timeout."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stages.extract_features.execution.threads import BackgroundWriter, prefetch, prefetch_map
from stages.processes import background
from stages.processes.background import DaemonPool, result_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stuck(monkeypatch):
    """What never returns, until the test is over."""
    monkeypatch.setattr(background, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(background, "SHUTDOWN_TIMEOUT_S", 0.05)
    over = threading.Event()

    def wait(*_):
        over.wait(60)

    yield wait
    over.set()


def test_results_and_errors_come_from_the_threads():
    with DaemonPool(2, "work") as pool:
        assert result_of(pool.submit(divmod, 7, 2), "dividing") == (3, 1)
        with pytest.raises(ZeroDivisionError):
            result_of(pool.submit(divmod, 1, 0), "dividing")
    assert not [t for t in threading.enumerate() if t.name.startswith("work-")]


def test_an_error_of_the_work_itself_is_not_taken_for_the_limit():
    def fail():
        raise TimeoutError("the bucket did not answer")

    with DaemonPool(1, "work") as pool, pytest.raises(TimeoutError, match="bucket"):
        result_of(pool.submit(fail), "reading")


def test_calls_that_have_not_begun_are_not_made_any_more():
    began, go_on, made = threading.Event(), threading.Event(), []

    def first():
        began.set()
        go_on.wait(60)
        made.append(1)

    with DaemonPool(1, "work") as pool:
        pool.submit(first)
        later = pool.submit(made.append, 2)
        began.wait(60)
        go_on.set()
        time.sleep(0)
        cancelled = later.cancel()
    assert made == ([1] if cancelled else [1, 2])


def test_a_clip_whose_decoding_is_stuck_is_named(stuck):
    made = prefetch_map(stuck, ["walk/7"], ahead=1, threads=1, describe=lambda key: f"clip {key}")
    with pytest.raises(TimeoutError, match=r"clip walk/7 has taken more than 0.2 s"):
        next(made)


def test_a_dataset_that_gives_nothing_ends_the_work(stuck):
    with pytest.raises(TimeoutError, match="next clip's record"):
        next(prefetch(stuck() for _ in range(3)))


@pytest.mark.parametrize("ending", ["put", "drain", "leave"])
def test_writing_that_is_stuck_ends_the_work(stuck, ending):
    with pytest.raises(TimeoutError, match="writing a clip"), BackgroundWriter(stuck) as behind:
        for item in range(4 if ending == "put" else 1):
            behind.put(item)
        if ending == "drain":
            behind.drain()


def test_a_writer_that_dies_of_anything_is_told():
    def leave(item):
        raise SystemExit(3)

    with pytest.raises(SystemExit), BackgroundWriter(leave) as behind:
        behind.put(1)
        behind.drain()


def test_an_interpreter_ends_though_a_thread_is_stuck():
    script = """
import threading
from stages.processes.background import DaemonPool
DaemonPool(1, "work").submit(threading.Event().wait)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=True)
