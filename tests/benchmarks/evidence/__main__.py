"""The comparison of training losses on drawn figures: everything that `README.md` describes.

    python -m tests.benchmarks.evidence --size smoke       # minutes
    python -m tests.benchmarks.evidence                    # seven to thirteen hours on two cores
    python -m tests.benchmarks.evidence --arms none lgf    # some arms
    python -m tests.benchmarks.evidence --results tests/benchmarks/evidence/results.jsonl

Run again, it makes what is missing: every run has a row of its own, and a stopped training goes on
from its checkpoint. --results takes the rows of another machine first, so that an arm can be added
to a comparison without its other runs. The report is written after each phase, and with --report
without any run. The last line is a JSON object: the numbers of runs there and failed, and where the
report is.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from tests.benchmarks.evidence.data import prepare
from tests.benchmarks.evidence.plan import arms_of, next_runs
from tests.benchmarks.evidence.report import write_report
from tests.benchmarks.evidence.runs import BASE, Run, perform, rows_of, take_rows
from tests.benchmarks.evidence.sizes import SIZES, Size
from tests.benchmarks.report import machine

_PRELOADED = ["tests.benchmarks.evidence.worker"]


def make_runs(runs: Sequence[Run], out: Path, size: Size, *, jobs: int) -> list[str]:
    """Make runs, `jobs` at a time, each in a process of its own; returns what failed and why.

    Args:
        runs: In the order in which they start.
        out: Folder of the comparison.
        size: Its lengths.
        jobs: Processes, of one thread each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    failed = []
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = list(runs)
        pending: dict[Future[str], tuple[Run, float]] = {}
        while waiting or pending:
            while waiting and len(pending) < jobs:
                run = waiting.pop(0)
                pending[pool.submit(perform, run, out, size)] = (run, time.monotonic())
            done = next(as_completed(pending))
            run, start = pending.pop(done)
            error = done.exception()
            if error is not None:
                failed.append(f"{run.name}: {type(error).__name__}: {error}")
            outcome = "failed" if error is not None else "done"
            print(f"{run.name}: {outcome} in {time.monotonic() - start:.0f} s", flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, and write the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--out", type=Path, help="folder of the comparison (evidence/SIZE)")
    parser.add_argument("--arms", nargs="+", default=(), help="only these arms")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--results", type=Path, help="results.jsonl of runs not to make again")
    parser.add_argument("--report", action="store_true", help="write the report only")
    arguments = parser.parse_args(argv)
    size, out = SIZES[arguments.size], arguments.out or Path("evidence") / arguments.size
    try:
        arms = arms_of(size, arguments.arms)
    except ValueError as error:
        parser.error(str(error))
    if arguments.results is not None:
        take_rows(out, arguments.results)
    failed: list[str] = []
    if not arguments.report:
        prepare(out, size)
        while not failed and (runs := next_runs(size, arms, rows_of(out))):
            failed = make_runs(runs, out, size, jobs=arguments.jobs)
            _report(out, size, arguments.size)
    report = _report(out, size, arguments.size)
    print(*failed, sep="\n", file=sys.stderr)
    found = {"runs": len(rows_of(out)), "failed": len(failed), "report": report and str(report)}
    print(json.dumps(found))
    return 1 if failed else 0


def _report(out: Path, size: Size, name: str) -> Path | None:
    """Write the report of what is there; None without the base model, which all is relative to."""
    rows = rows_of(out)
    if Run(arm=BASE).name not in rows:
        return None
    return write_report(out, rows, size, machine=machine(torch.device("cpu")), name=name)


if __name__ == "__main__":
    sys.exit(main())
