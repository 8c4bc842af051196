"""Stop requests: never lost; a second signal always ends the process."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from stages.processes.stop_request import ENDED_BY_SIGNAL, stop_on_signals

ROOT = Path(__file__).parents[3]


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script, *arguments):
    process = start(script, *arguments)
    told, errors = process.communicate(timeout=60)
    return process.returncode, told, errors


WHERE_IT_IS_LOST = {
    "del": """
        class Library:
            def __del__(self):
                ask()
        Library()
    """,
    "weak reference": """
        import weakref
        class Library:
            pass
        library = Library()
        reference = weakref.ref(library, lambda gone: ask())
        del library
    """,
    "callback from C": """
        import ctypes
        ctypes.CFUNCTYPE(None)(ask)()
    """,
    "twice": """
        class Library:
            def __del__(self):
                ask()
                try:
                    time.sleep(60)
                finally:
                    again.append(Again())
        class Again:
            def __del__(self):
                time.sleep(60)
        again = []
        Library()
        again.clear()
    """,
}


@pytest.mark.parametrize("where", WHERE_IT_IS_LOST)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_that_python_drops_is_raised_again(where, number):
    code, told, errors = run(
        f"""
        import os, signal, sys, time
        from stages.processes.stop_request import stop_on_signals
        def ask():
            os.kill(os.getpid(), {int(number)})
        with stop_on_signals():
            try:
                exec(sys.argv[1])
                time.sleep(60)
            except KeyboardInterrupt:
                print("asked to stop")
        """,
        textwrap.dedent(WHERE_IT_IS_LOST[where]),
    )
    assert (code, told, errors) == (0, "asked to stop\n", "")


def test_a_request_that_a_library_catches_is_raised_where_work_advances():
    from stages.progress import SilentProgress

    with stop_on_signals() as stop, SilentProgress().task("work", 2) as task:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            task.advance()


def test_a_dropped_request_that_was_met_meanwhile_is_not_raised_again():
    class Library:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    with stop_on_signals() as stop:
        Library()
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        time.sleep(0.2)  # past the pause before it would be raised again
    assert stop.times_raised == 2


def test_work_that_ends_before_a_dropped_request_is_raised_again_ends_as_it_is():
    code, told, errors = run(
        """
        import os, signal
        from stages.processes.stop_request import stop_on_signals
        class Library:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
        with stop_on_signals():
            Library()
        print("done")
        """
    )
    assert (code, told, errors) == (0, "done\n", "")


def test_work_that_is_being_wound_up_is_not_interrupted_again():
    from stages.progress import SilentProgress

    done = []
    with stop_on_signals(), pytest.raises(KeyboardInterrupt):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            SilentProgress().log("closing")
            done.append("closed")
    assert done == ["closed"]


def test_a_deferred_request_raises_nothing_and_is_still_there_afterwards(capfd):
    with stop_on_signals() as stop:
        with stop.deferred("stopping soon"):
            os.kill(os.getpid(), signal.SIGINT)
            stop.check()
            assert stop.requested
            told, deadline = "", time.monotonic() + 60
            while not told and time.monotonic() < deadline:
                told = capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert told == "stopping soon; a second signal ends the process at once\n"


def test_a_request_that_was_fulfilled_raises_nothing_more():
    with stop_on_signals() as stop:
        with stop.deferred("stopping soon"):
            os.kill(os.getpid(), signal.SIGTERM)
            stop.mark_handled()
        os.kill(os.getpid(), signal.SIGINT)  # the same request, passed on by a launcher
        stop.check()
        assert not stop.requested


STUCK = {
    "in a library": """
        # A mutex that is locked already: signals do not wake who waits for it.
        import ctypes
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        libc.pthread_mutex_lock(mutex)
        with request.deferred("later"):
            print("ready", flush=True)
            libc.pthread_mutex_lock(mutex)
    """,
    "closing": """
        while True:
            try:
                print("ready", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                pass
    """,
    "deferred": """
        with request.deferred("later"):
            print("ready", flush=True)
            while True:
                time.sleep(60)
    """,
    "fulfilled": """
        with request.deferred("later"):
            os.kill(os.getpid(), signal.SIGTERM)
            request.mark_handled()
        print("ready", flush=True)
        while True:
            time.sleep(60)
    """,
    "a library's own handlers": """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        print("ready", flush=True)
        while True:
            time.sleep(60)
    """,
}


@pytest.mark.parametrize("where", STUCK)
def test_a_second_signal_ends_the_process_wherever_it_is(where):
    process = start(
        """
        import os, signal, sys, time
        from stages.processes import stop_request
        stop_request.REPEATS_WITHIN_S = 0.01
        with stop_request.stop_on_signals() as request:
            exec(sys.argv[1])
        """,
        textwrap.dedent(STUCK[where]),
    )
    assert process.stdout.readline() == "ready\n"
    numbers = [signal.SIGTERM, signal.SIGINT]
    deadline = time.monotonic() + 60
    sent = 0
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(numbers[sent % 2])
        sent += 1
        time.sleep(0.1)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == ENDED_BY_SIGNAL
    assert errors.endswith("ended at once by a second signal\n")
    assert sent >= 2 or where == "fulfilled"


def test_signals_in_quick_succession_are_one_request():
    with stop_on_signals() as stop, pytest.raises(KeyboardInterrupt):
        with stop.deferred("later"):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
                os.kill(os.getpid(), number)
        stop.check()


def test_a_fork_answers_for_itself():
    with stop_on_signals() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)  # the terminal sends it to both
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert not stop.requested


def test_handlers_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [*map(signal.getsignal, numbers), sys.unraisablehook]
    with stop_on_signals() as stop, stop_on_signals() as inner:
        assert inner is stop
    assert [*map(signal.getsignal, numbers), sys.unraisablehook] == before
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_another_thread_can_work_too():
    requested = []

    def work():
        with stop_on_signals() as stop:
            requested.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [False]
