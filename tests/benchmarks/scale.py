"""What one process spends as clips grow from a thousand to a million: time, memory, files.

    python tests/benchmarks/scale.py --label "main, 2026-11-26" --folder DIR \
        --write tests/benchmarks/scale.md

Each cell (`scale_cells.py`) is a process of its own with a limit in time; memory is the most that
process had resident, imports included ("a process that imports stage one" has as much without any
clip), and seconds are by the clock, and in parentheses the processor's. Seconds do not include
imports. Results are appended to DIR/results.jsonl as they come: a benchmark that was stopped goes
on. Where a size passes the limit, larger ones are not tried. The data are made up
(`scale_fixtures.py`). What the results come to at 10^8 clips is computed by `scale_estimate.py`.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.scale_cells import CELLS, report
from tests.benchmarks.scale_fixtures import FIXTURES, PER_SHARD, Found

SIZES = (1_000, 10_000, 100_000, 1_000_000)


def main() -> None:
    """Measure what is not measured yet, and print the table of one label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="now", help="which results belong together")
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--limit", type=float, default=300, help="seconds of a cell")
    parser.add_argument("--groups-up-to", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--show", action="store_true", help="measure nothing, print what there is")
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        name, fixture, empty, size = options.cell
        report(CELLS[name][2](Path(fixture), Path(empty), int(size)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / "results.jsonl"
    for size in () if options.show else options.sizes:
        for name in options.only:
            known = of_label(results, options.label)
            if (name, size) not in known and not _hopeless(known, name, size, options):
                row = {"label": options.label, "cell": name, "size": size}
                found = measure(name, size, options)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | found) + "\n")
                print(f"{name}, {size}: {found}", file=sys.stderr, flush=True)
    show(of_label(results, options.label), options)


def of_label(results: Path, label: str) -> dict[tuple[str, int], Found]:
    """What has been measured under a label, by cell and size."""
    if not results.is_file():
        return {}
    rows = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {(row["cell"], row["size"]): row for row in rows if row["label"] == label}


def _hopeless(
    known: dict[tuple[str, int], Found], name: str, size: int, options: argparse.Namespace
) -> bool:
    too_long = any(
        "over_s" in row for (cell, smaller), row in known.items() if cell == name and smaller < size
    )
    return too_long or (CELLS[name][1] and size > options.groups_up_to)


def measure(name: str, size: int, options: argparse.Namespace) -> Found:
    """One cell, in a process of its own; its fixture is made first if it is not there."""
    kind = CELLS[name][0]
    fixture = options.folder / f"{kind}-{size}"
    if not fixture.exists():
        making = options.folder / f"{kind}-{size}.partial"
        shutil.rmtree(making, ignore_errors=True)
        groups = size // PER_SHARD if size <= options.groups_up_to else 2
        FIXTURES[kind](making, size, groups)
        making.rename(fixture)
    empty = options.folder / "cell"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    command = [sys.executable, __file__, "--cell", name, fixture, empty, str(size)]
    # The limit is on the whole process, which first imports and makes links.
    try:
        printed = subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if name == "cache copy" else None,  # a bar
            check=True,
            text=True,
            timeout=options.limit,
        ).stdout
        found: Found = json.loads(printed.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"over_s": options.limit}
    except subprocess.CalledProcessError as error:
        found = {"failed": error.returncode}
    finally:
        shutil.rmtree(empty, ignore_errors=True)
    return found


def exponent(known: dict[tuple[str, int], Found], name: str) -> float | None:
    """Of the growth of processor time between the two largest sizes; None below 0.2 s."""
    timings = sorted(
        (size, row["processor_s"])
        for (cell, size), row in known.items()
        if cell == name and row.get("processor_s")
    )
    if len(timings) < 2 or timings[-1][1] < 0.2:
        return None
    (small, before), (large, after) = timings[-2:]
    return math.log(after / before) / math.log(large / small)


def show(known: dict[tuple[str, int], Found], options: argparse.Namespace) -> None:
    """The table: seconds by the clock, of the processor, and the most memory."""
    import torch

    from tests.benchmarks.report import finish, machine, table
    from tests.benchmarks.scale_estimate import section

    sizes = sorted({size for _, size in known})
    rows = []
    growths = {}
    for name in CELLS:
        cells = [_cell(known.get((name, size))) for size in sizes]
        growths[name] = exponent(known, name)
        growth = growths[name]
        if any(cells):
            rows.append([name, *cells, "" if growth is None else f"{growth:.2f}"])
    over = [one for one in growths.values() if one is not None]
    header = ["", *(f"{size:,}" for size in sizes), "growth"]
    finish(
        "scale",
        f"{table(header, rows)}\n\n{section(known)}",
        {
            "value": round(max(over, default=0.0), 2),
            "target": 1.2,
            "spread": [round(min(over, default=0.0), 2), round(max(over, default=0.0), 2)],
            "machine": machine(torch.device("cpu")),
            "settings": {
                "label": options.label,
                "limit_s": options.limit,
                "groups_up_to": options.groups_up_to,
            },
        },
        options.write,
    )


def _cell(row: Found | None) -> str:
    if not row:
        return ""
    if "over_s" in row:
        return f"> {row['over_s']:.0f} s"
    if "failed" in row:
        return "failed"
    if "inodes" in row:
        return f"{row['inodes']:.1f}"
    if "read_operations" in row:
        return f"{row['write_operations']:.0f} to write, {row['read_operations']:.0f} to read"
    if "s" not in row:
        return ""
    size = f", {row['MB']:.3g} MB written" if "MB" in row else ""
    return f"{row['s']:.2g} s ({row['processor_s']:.2g}), {row['peak_mb']:.0f} MB{size}"


if __name__ == "__main__":
    main()
