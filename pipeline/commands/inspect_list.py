"""`inspect --list`: the clips of a store with quality, lost frames and prompts."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cache_schema import StoreReader
from pipeline.commands.skipped_notes import count_by_reason
from pipeline.config.load import ConfigError
from pipeline.console import CommandResult

if TYPE_CHECKING:
    from stages.inspect_cache.clip_facts import ClipLine


def list_clips(reader: StoreReader, *, sort: str | None, as_csv: bool) -> CommandResult:
    """List the clips of a store.

    Args:
        reader: the store.
        sort: a column name for ascending order, with a leading dash for descending; None keeps the
            store's order. Clips without a value come last.
        as_csv: return CSV instead of a table.

    Raises:
        ConfigError: no such column.
        CacheError: a record is damaged.
    """
    from stages.inspect_cache.clip_facts import COLUMNS, clip_lines

    column = (sort or "").removeprefix("-")
    if column and column not in COLUMNS:
        raise ConfigError(
            f"--sort {sort}: no such column; there are {', '.join(COLUMNS)}. A leading dash "
            "reverses the order: -quality lists the best first"
        )
    lines = list(clip_lines(reader))
    if column:
        lines = _sorted(lines, column, descending=(sort or "").startswith("-"))
    rows = [asdict(line) for line in lines]
    shown = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    reasons = f": {count_by_reason(reader.skipped)}" if reader.skipped else ""
    return CommandResult(
        title=f"{len(rows)} clips in {reader.name}, and {len(reader.skipped)} skipped{reasons}",
        rows=[],
        data={
            "store": str(reader.path),
            "kind": reader.settings.kind,
            "clips": rows,
            "skipped": [clip.as_dict() | {"shard": clip.shard} for clip in reader.skipped],
        },
        notes=_columns(shown, [[_shown(row[name]) for name in shown] for row in rows]),
        text=_csv(COLUMNS, rows) if as_csv else None,
    )


def _sorted(lines: Sequence[ClipLine], column: str, *, descending: bool) -> list[ClipLine]:
    known = [line for line in lines if getattr(line, column) is not None]
    known.sort(key=lambda line: getattr(line, column), reverse=descending)
    return [*known, *(line for line in lines if getattr(line, column) is None)]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns; long keys widen their column and are never truncated."""
    table = [list(names), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]


def _csv(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
