"""Runs one command within a time limit, with everything that it starts, and reads its result."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

Outcome = Literal["measured", "failed", "timed out"]
MAX_OUTPUT = 4000
"""Characters kept of the output of a command that failed."""
_SECONDS_TO_END = 5.0


def run_command(
    command: Sequence[str], *, seconds: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run a command in a process group of its own, which is killed at the limit.

    Returns:
        `outcome`; `seconds` taken; `result`, the JSON object on the last line of its standard
        output, or None; and `output`, the end of what it printed, None if it was measured.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=dict(environment), process_group=0
        )
        try:
            code: int | None = process.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)
        printed, complaints = (_read(file) for file in (out, errors))
    result = _last_object(printed)
    outcome: Outcome = "failed"
    if code is None:
        outcome = "timed out"
    elif code == 0 and result is not None:
        outcome = "measured"
    output = f"{printed}\n{complaints}".strip()[-MAX_OUTPUT:]
    return {
        "outcome": outcome,
        "seconds": round(time.monotonic() - started, 1),
        "result": result,
        "output": None if outcome == "measured" else output,
    }


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of the group: first by request, so that temporary folders go."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_SECONDS_TO_END)


def _read(file: Any) -> str:
    file.seek(0)
    return str(file.read())


def _last_object(printed: str) -> dict[str, Any] | None:
    lines = printed.strip().splitlines()
    if not lines:
        return None
    try:
        value = json.loads(lines[-1])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
