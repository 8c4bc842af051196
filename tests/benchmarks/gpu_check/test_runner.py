"""The check's runner: limits of time, resumption, failures, and a rehearsal of the real parts."""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.benchmarks.gpu_check import __main__ as command_line
from tests.benchmarks.gpu_check.commands import run_command
from tests.benchmarks.gpu_check.parts import BENCHMARKS, PARTS, Measurement, Part, Size
from tests.benchmarks.gpu_check.results import machine_facts, read_rows
from tests.benchmarks.gpu_check.table import tables

MACHINE: dict[str, Any] = {
    "gpu": None,
    "torch": "2.13.0",
    "cuda": None,
    "cpu": "a processor",
    "cores": 2,
    "driver": None,
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
}
SLEEP = "import time; time.sleep(600)"


def part_of(folder: Path, **scripts: str) -> Part:
    """A part whose measurements are scripts."""
    measurements = []
    for name, script in scripts.items():
        file = folder / f"{name}.py"
        file.write_text(script, encoding="utf-8")
        arguments = dict.fromkeys(get_args(Size), "")
        measurements.append(Measurement(name=name, script=str(file), arguments=arguments))
    return Part(
        name="made_up",
        title="scripts",
        minutes=5.0,
        measurements=tuple(measurements),
        columns={"value": ("inner", "value")},
        without_gpu="nothing",
    )


def run(part: Part, out: Path, *, minutes: float = 5.0, machine: dict[str, Any] = MACHINE) -> bool:
    return command_line.run_parts([part], size="tiny", out=out, minutes=minutes, machine=machine)


def ends(pid: int) -> bool:
    """Whether a process ends, reaped or not by whoever adopts it, within ten seconds."""
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def outcomes(part: Part, out: Path) -> dict[str, str]:
    return {row["measurement"]: row["outcome"] for row in read_rows(out, part)}


def printing(value: int) -> str:
    return f"print('words'); print({json.dumps({'inner': {'value': value}})!r})"


def test_a_failure_is_recorded_with_its_end_and_the_others_run(tmp_path: Path) -> None:
    part = part_of(
        tmp_path,
        fails="raise ValueError('what went wrong')",
        silent="print('no result')",
        works=printing(7),
    )
    assert not run(part, tmp_path / "out")
    assert outcomes(part, tmp_path / "out") == {
        "fails": "failed",
        "silent": "failed",
        "works": "measured",
    }
    fails, _, works = read_rows(tmp_path / "out", part)
    assert fails["output"].endswith("ValueError: what went wrong")
    assert works["result"] == {"inner": {"value": 7}} and works["output"] is None
    text = tables(tmp_path / "out", [part])
    assert "| works | 7 | measured |" in text and "ValueError: what went wrong" in text
    assert "no GPU; a processor, 2 cores; torch 2.13.0" in text


def test_at_its_limit_a_command_ends_with_all_it_started(tmp_path: Path) -> None:
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])"
    script = f"{child}; print(p.pid, flush=True); p.wait()"
    found = run_command([sys.executable, "-c", script], seconds=3.0, environment=os.environ)
    assert found["outcome"] == "timed out" and found["result"] is None
    assert ends(int(found["output"].splitlines()[0]))


def test_a_stopped_check_leaves_nothing_running(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    script = f"import os; open({str(noted)!r}, 'w').write(f'{{os.getpid()}}.'); {SLEEP}"
    check = tmp_path / "check.py"
    check.write_text(
        "import sys\nfrom tests.benchmarks.gpu_check import __main__ as line\n"
        "line.machine_facts = dict\n"
        f"line.run_parts = lambda *_, **__: line.run_command([sys.executable, '-c', {script!r}], "
        "seconds=600, environment={})\n"
        f"sys.argv = ['gpu_check', '--size', 'tiny', '--out', {str(tmp_path)!r}]\nline.main()\n",
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parents[1])}
    process = subprocess.Popen([sys.executable, str(check)], env=environment)
    while not (noted.exists() and noted.read_text().endswith(".")):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert ends(int(noted.read_text().rstrip(".")))


def test_without_time_left_nothing_starts(tmp_path: Path) -> None:
    part = part_of(tmp_path, works=printing(1))
    assert not run(part, tmp_path / "out", minutes=0.0)
    assert outcomes(part, tmp_path / "out") == {}
    assert tables(tmp_path / "out", [part]).startswith("no results")


def test_a_second_run_makes_only_what_is_missing_and_new_things_first(tmp_path: Path) -> None:
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    waits_for = tmp_path / "now"
    scripts = {
        "flaky": f"{note}('f'); import os; os.path.exists({str(waits_for)!r}) or 1 / 0\n",
        "steady": f"{note}('s')\n",
        "late": f"{note}('l')\n",
    }
    part = part_of(tmp_path, **{name: text + printing(3) for name, text in scripts.items()})
    first = part_of(tmp_path, **{name: scripts[name] + printing(3) for name in ("flaky", "steady")})
    assert not run(first, tmp_path / "out")
    waits_for.touch()
    assert run(part, tmp_path / "out")
    assert (tmp_path / "order").read_text() == "fs" + "lf"
    assert set(outcomes(part, tmp_path / "out").values()) == {"measured"}
    assert len(read_rows(tmp_path / "out", part)) == 3


def test_results_of_another_machine_are_kept_beside(tmp_path: Path) -> None:
    part = part_of(tmp_path, works=printing(5))
    other = MACHINE | {"gpu": "NVIDIA H100", "gpu_mib": 81559, "driver": "580.1"}
    assert run(part, tmp_path / "out") and run(part, tmp_path / "out", machine=other)
    rows = read_rows(tmp_path / "out", part)
    assert [row["machine"]["gpu"] for row in rows] == [None, "NVIDIA H100"]
    assert "## NVIDIA H100, 81559 MiB, driver 580.1" in tables(tmp_path / "out", [part])


def test_full_sizes_are_refused_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "machine_facts", lambda: MACHINE)
    for arguments, words in (
        ([], "--size tiny rehearses"),
        (["--size", "tiny", "--parts", "steps"], "unknown part steps; the parts are tests, "),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


class _ParsedError(Exception):
    pass


@pytest.mark.parametrize("size", get_args(Size))
def test_every_script_takes_its_arguments(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    # A wrong option of a full size would otherwise show on the GPU first.
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, args: Sequence[str] | None = None) -> None:
        parse(self, args)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    measurements = [one for part in PARTS for one in part.measurements]
    for measurement in measurements:
        if measurement.script.endswith("marked_tests.py"):
            continue  # takes no arguments
        monkeypatch.setattr(sys, "argv", measurement.command(size))
        with pytest.raises(_ParsedError):
            runpy.run_path(measurement.command(size)[0], run_name="__main__")


def _rehearse(out: Path, parts: list[Part], minutes: float) -> None:
    complete = command_line.run_parts(
        parts, size="tiny", out=out, minutes=minutes, machine=machine_facts()
    )
    assert complete, tables(out, parts)
    for part in parts:
        shown = tables(out, [part])
        assert shown.count("| measured |") == len(part.measurements)


@pytest.mark.slow
def test_rehearsal_of_one_measurement(tmp_path: Path) -> None:
    (part,) = (part for part in PARTS if part.name == "models")
    (text,) = (one for one in part.measurements if one.name == "text encoder")
    _rehearse(tmp_path, [replace(part, measurements=(text,))], 4.0)
    (row,) = read_rows(tmp_path, part)
    result = row["result"]
    assert result["measured_mib"]["weights"] == result["estimated_mib"]["weights"]
    assert result["seconds"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rehearsal_of_everything(tmp_path: Path) -> None:
    _rehearse(tmp_path, list(PARTS), 55.0)
