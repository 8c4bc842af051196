"""Ctrl-C and SIGTERM while a command is still importing."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.processes.stop_request import ENDED_BY_SIGNAL

ROOT = Path(__file__).parents[2]

HOOK = """
import os, signal, sys

asked = {"events": 0}

def ask(event, arguments):
    if event == "import" and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        asked["events"] += 1
        if asked["events"] == int(os.environ["ASK_AT_IMPORT"]):
            if os.environ["ASK_IN"] == "a finalizer":
                Finalized()
            elif os.environ["ASK_IN"] == "a library that catches all":
                try:
                    Finalized().ask()
                except BaseException:
                    pass
            else:
                Finalized().ask()

class Finalized:
    asked = False

    def ask(self):
        if not Finalized.asked:
            Finalized.asked = True
            os.kill(os.getpid(), int(os.environ["ASK_WITH"]))

    __del__ = ask

sys.addaudithook(ask)
"""
"""As sitecustomize: a signal at the import of that number, counted from when signals are taken."""

MAIN = "from pipeline.__main__ import main; main()"
"""As the installed command. With `-m`, CPython 3.11 and 3.12 kill themselves by SIGINT at the end
if the interrupt has left an `exec`, as in dataclasses; a shell shows 130 for both."""

WAYS = ("the import", "a finalizer", "a library that catches all")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A configuration that trains on tiny stores, in the folder it is given: its file."""
    path = ROOT / "tests/stages/train_student/conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_stores", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    base = tiny.save_pipeline(tmp_path_factory.mktemp("base"))
    cache = tiny.write_cache(tmp_path_factory.mktemp("cache"))

    def write(folder):
        settings = {
            "name": "tiny",
            "cache": str(cache),
            "data": {"path": "clips", "num_frames": 9, "height": 32, "width": 48},
            "model": {"path": str(base)},
            "train": tiny.train_settings(folder / "run"),
        }
        YAML().dump(settings, folder / "tiny.yaml")
        return str(folder / "tiny.yaml")

    return write


def command(tmp_path, number, way, with_signal, *arguments):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    return subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        env=os.environ
        | {
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
            "ASK_AT_IMPORT": str(number),
            "ASK_IN": way,
            "ASK_WITH": str(int(with_signal)),
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize("seed", range(9))
def test_a_command_that_is_asked_to_stop_while_it_starts_does_no_work(tmp_path, seed):
    chosen = random.Random(seed)
    number, way = chosen.randrange(1, 500), WAYS[seed % 3]  # of about 600 imports
    with_signal = chosen.choice([signal.SIGINT, signal.SIGTERM])
    answer = command(tmp_path, number, way, with_signal, "config", "show")
    assert answer.returncode == ENDED_BY_SIGNAL, answer.stderr
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(27))
def test_a_training_that_is_asked_to_stop_while_it_starts_makes_no_step(tmp_path, tiny_run, seed):
    chosen = random.Random(seed)
    number, way = chosen.randrange(1, 5000), WAYS[seed % 3]  # of some 5,300
    with_signal = chosen.choice([signal.SIGINT, signal.SIGTERM])
    answer = command(tmp_path, number, way, with_signal, "train", "--config", tiny_run(tmp_path))
    assert answer.returncode == ENDED_BY_SIGNAL, answer.stderr
    losses = tmp_path / "run" / "losses.jsonl"
    assert not losses.exists() or losses.read_text() == ""
