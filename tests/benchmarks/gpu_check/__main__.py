"""Everything to check on a GPU, most worth first, each part within its own time limit.

    python -m tests.benchmarks.gpu_check                          # on a machine with a GPU
    python -m tests.benchmarks.gpu_check --size tiny              # the rehearsal, on any machine
    python -m tests.benchmarks.gpu_check --parts step,memory --minutes 9

Each measurement is a process of its own, and its result is written before the next starts. Run
again, with the same code on the same kind of machine, it makes those that have not succeeded.
The exit code is 0 if every measurement asked for is there, 1 if one is not, 2 for a wrong option.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tests.benchmarks.gpu_check.commands import run_command
from tests.benchmarks.gpu_check.parts import PARTS, ROOT, Part, Size
from tests.benchmarks.gpu_check.results import (
    add_row,
    code_hash,
    machine_facts,
    read_rows,
    same_setting,
)
from tests.benchmarks.gpu_check.table import tables


def run_parts(
    parts: Sequence[Part],
    *,
    size: Size,
    out: Path,
    minutes: float,
    machine: dict[str, Any],
) -> bool:
    """Make the measurements that are not there yet; return whether all are there.

    Args:
        parts: In the order in which they run.
        size: Of models and clips.
        out: Folder of the results.
        minutes: Limit of everything; a part that is cut off by it is recorded as timed out.
        machine: From `machine_facts`.
    """
    end = time.monotonic() + 60 * minutes
    code, complete = code_hash(), True
    for part in parts:
        rows = read_rows(out, part)
        part_end = min(end, time.monotonic() + 60 * part.minutes)
        tried = {row["measurement"] for row in rows}
        # One that took all the time before must not do so again before the others have run.
        for measurement in sorted(part.measurements, key=lambda one: one.name in tried):
            row = {
                "measurement": measurement.name,
                "size": size,
                "machine": machine,
                "code": code,
            }
            name = f"{part.name}, {measurement.name}"
            if any(same_setting(one, row) and one["outcome"] == "measured" for one in rows):
                print(f"{name}: measured already", flush=True)
                continue
            if time.monotonic() >= part_end:
                print(f"{name}: no time left", flush=True)
                complete = False
                continue
            command = [sys.executable, *measurement.command(size)]
            row |= run_command(
                command, seconds=part_end - time.monotonic(), environment=_environment()
            )
            rows = add_row(out, part, rows, row)
            complete = complete and row["outcome"] == "measured"
            print(f"{name}: {row['outcome']} in {row['seconds']:.0f} s", flush=True)
    return complete


def _environment() -> dict[str, str]:
    """This process's, with the project on the path, no downloads and no bars of progress."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def main() -> None:
    """Run, print the tables, and exit."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--parts", default=",".join(names), help=f"some of {', '.join(names)}")
    parser.add_argument("--size", choices=get_args(Size), default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--minutes", type=float, default=60.0, help="limit of everything")
    options = parser.parse_args()
    chosen = options.parts.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"unknown part {', '.join(unknown)}; the parts are {', '.join(names)}")
    # As Ctrl-C does: the measurement that runs must not outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    machine = machine_facts()
    if options.size == "full" and machine["gpu"] is None:
        parser.error(
            "torch sees no GPU here, and full sizes need one; --size tiny rehearses on a CPU"
        )
    complete = run_parts(
        [part for part in PARTS if part.name in chosen],
        size=options.size,
        out=options.out,
        minutes=options.minutes,
        machine=machine,
    )
    print(tables(options.out))
    raise SystemExit(0 if complete else 1)


if __name__ == "__main__":
    main()
