"""Tables of the check's results, in Markdown.

python -m tests.benchmarks.gpu_check.table build/gpu-check
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_check.parts import PARTS, Part
from tests.benchmarks.gpu_check.results import Row, read_rows

UNKNOWN = "–"


def tables(folder: Path, parts: Sequence[Part] = PARTS) -> str:
    """Lay out every part's rows, machine by machine and version of the code by version."""
    rows_of = {part.name: read_rows(folder, part) for part in parts}
    settings = dict.fromkeys(_setting(row) for rows in rows_of.values() for row in rows)
    sections = []
    for setting in settings:
        lines = [f"## {setting}"]
        for part in parts:
            rows = [row for row in rows_of[part.name] if _setting(row) == setting]
            found = {row["measurement"]: row for row in rows}
            lines += ["", f"### {part.name}: {part.title}", "", _table(part, found)]
            if rows and rows[0]["machine"]["gpu"] is None:
                lines += ["", f"Without a GPU: {part.without_gpu}."]
            lines += [
                f"\n{name}, {row['outcome']}:\n\n```\n{row['output']}\n```"
                for name, row in found.items()
                if row["output"]
            ]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) if sections else f"no results in {folder}"


def _setting(row: Row) -> str:
    machine = row["machine"]
    gpu = "no GPU"
    if machine["gpu"] is not None:
        gpu = f"{machine['gpu']}, {machine['gpu_mib']} MiB, driver {machine['driver']}"
    commit = (machine["commit"] or "unknown")[:10]
    changed = " with changes" if machine["uncommitted_changes"] else ""
    return (
        f"{gpu}; {machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}; "
        f"size {row['size']}; commit {commit}{changed}, code {row['code']}"
    )


def _table(part: Part, found: dict[str, Row]) -> str:
    columns = {
        heading: path
        for heading, path in part.columns.items()
        if any(_value(row["result"], path) is not None for row in found.values())
    }
    lines = [["", *columns, "outcome", "took, s"]]
    lines.append(["---"] * len(lines[0]))
    for measurement in part.measurements:
        row = found.get(measurement.name)
        if row is None:
            values = [UNKNOWN] * len(columns) + ["not run yet", UNKNOWN]
        else:
            shown = [_shown(_value(row["result"], path)) for path in columns.values()]
            values = [*shown, row["outcome"], f"{row['seconds']:.0f}"]
        lines.append([measurement.name, *values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(result: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(result, dict) or name not in result:
            return None
        result = result[name]
    return result


def _shown(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(tables(Path(sys.argv[1])))
