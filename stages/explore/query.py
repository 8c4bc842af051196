"""Which clips a page lists: search, filters and order over the columns, and histograms of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stages.explore.table import LABELS, NUMBERS, ClipTable

MAX_PAGE = 200
"""Clips per page at most."""

_MAX_SEARCH_CHARS = 200
_MAX_FILTERS = 32
_BINS = 32

Shown = Literal["stored", "skipped", "left_out"]


class BadQuery(ValueError):  # noqa: N818 (named after the condition)
    """A query names an unknown column, or has a value that is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What is asked for; clips must pass every filter."""

    show: Shown = "stored"
    """Stored clips, skipped ones, or those on the list of clips to leave out."""
    search: str = ""
    """Words that must all be in the key or the caption, ignoring case."""
    ranges: tuple[tuple[str, float, float], ...] = ()
    """Column of numbers, lowest and highest value; clips without a value do not pass."""
    labels: tuple[tuple[str, str], ...] = ()
    """Column of words, and the word."""
    sort: str | None = None
    """Column of numbers in ascending order; None keeps the order of the keys."""
    descending: bool = False
    """Reverse `sort`; clips without a value come last in either order."""


def parse_query(parameters: Mapping[str, Sequence[str]]) -> Query:
    """Read a query from the parameters of an address.

    `show`, `search`, `sort` (a leading dash for descending order), and any number of
    `range=column:low:high` and `label=column:word`.

    Raises:
        BadQuery: A value that is none of these.
    """
    show = _one(parameters, "show", "stored")
    if show not in ("stored", "skipped", "left_out"):
        raise BadQuery(f"show must be stored, skipped or left_out, got {show[:40]!r}")
    search = _one(parameters, "search", "")
    if len(search) > _MAX_SEARCH_CHARS:
        raise BadQuery(f"search for at most {_MAX_SEARCH_CHARS} characters")
    sort = _one(parameters, "sort", "")
    column = sort.removeprefix("-")
    if column and column not in NUMBERS:
        raise BadQuery(f"no column {column[:40]!r} to sort by; there are {', '.join(NUMBERS)}")
    ranges, labels = parameters.get("range", ()), parameters.get("label", ())
    if len(ranges) + len(labels) > _MAX_FILTERS:
        raise BadQuery(f"at most {_MAX_FILTERS} filters")
    return Query(
        show=show,
        search=search,
        ranges=tuple(map(_range, ranges)),
        labels=tuple(map(_label, labels)),
        sort=column or None,
        descending=sort.startswith("-"),
    )


def _one(parameters: Mapping[str, Sequence[str]], name: str, default: str) -> Any:
    values = parameters.get(name, ())
    return values[-1] if values else default


def _range(text: str) -> tuple[str, float, float]:
    name, _, bounds = text.partition(":")
    low, _, high = bounds.partition(":")
    if name not in NUMBERS:
        raise BadQuery(f"no column {name[:40]!r} of numbers; there are {', '.join(NUMBERS)}")
    try:
        found = float(low), float(high)
    except ValueError:
        raise BadQuery(f"a range is column:low:high, got {text[:80]!r}") from None
    if not found[0] <= found[1]:  # also for NaN
        raise BadQuery(f"the range {text[:80]!r} is empty")
    return name, *found


def _label(text: str) -> tuple[str, str]:
    name, _, word = text.partition(":")
    if name not in LABELS:
        raise BadQuery(f"no column {name[:40]!r} of words; there are {', '.join(LABELS)}")
    return name, word


def select(table: ClipTable, query: Query, left_out: Collection[str]) -> np.ndarray:
    """Rows that pass, in order: int64.

    Args:
        table: The clips.
        query: Filters and order.
        left_out: Keys on the list of clips to leave out.
    """
    rows = np.flatnonzero(_passing(table, query, left_out))
    if query.sort is None:
        return rows
    values = table.numbers[query.sort][rows]
    known = ~np.isnan(values)
    order = np.argsort(-values[known] if query.descending else values[known], kind="stable")
    return np.concatenate([rows[known][order], rows[~known]])


def _passing(
    table: ClipTable, query: Query, left_out: Collection[str], *, ignoring: str | None = None
) -> np.ndarray:
    """Whether each row passes the filters, except those on the column `ignoring`."""
    count = len(table)
    passing = np.zeros(count, bool)
    if query.show == "left_out":
        rows = [row for key in left_out if (row := table.row_of(key)) is not None]
        passing[[row for row in rows if row < count]] = True
    elif query.show == "stored":
        passing[: table.num_stored] = True
    else:
        passing[table.num_stored :] = True
    if query.search.strip():
        found = table.matching(query.search)[:count]
        passing &= np.pad(found, (0, count - len(found)))
    for name, low, high in query.ranges:
        if name != ignoring:
            values = table.numbers[name][:count]
            passing &= (values >= np.float32(low)) & (values <= np.float32(high))
    for name, word in query.labels:
        if name != ignoring:
            names = table.names[name]
            passing &= table.codes[name][:count] == (names.index(word) if word in names else -2)
    return passing


def histograms(table: ClipTable, query: Query, left_out: Collection[str]) -> dict[str, Any]:
    """Counts by column, over the clips that pass the filters on all other columns.

    Returns:
        numbers: for each column with two different values its title, the lowest and highest value
            of any clip, counts in equal bins between them, and the number of clips without a value;
        labels: for each column with any word its title and the clips with each word.
    """
    passing = _passing(table, query, left_out)
    filtered = {name for name, _, _ in query.ranges} | {name for name, _ in query.labels}
    numbers, labels = {}, {}
    for name, title in NUMBERS.items():
        column = table.numbers[name][: len(passing)]
        any_known = column[~np.isnan(column)]
        if not len(any_known) or any_known.min() == any_known.max():
            continue
        low, high = float(any_known.min()), float(any_known.max())
        of_column = column[_others(table, query, left_out, passing, name, filtered)]
        known = of_column[~np.isnan(of_column)]
        counts, _ = np.histogram(known, bins=_BINS, range=(low, high))
        numbers[name] = {
            "title": title,
            "low": low,
            "high": high,
            "counts": counts.tolist(),
            "missing": len(of_column) - len(known),
        }
    for name, title in LABELS.items():
        chosen = _others(table, query, left_out, passing, name, filtered)
        codes = table.codes[name][: len(passing)][chosen]
        counts = np.bincount(codes[codes >= 0], minlength=len(table.names[name]))
        words = zip(table.names[name], counts.tolist(), strict=False)
        found = [[word, count] for word, count in words]
        if found:
            labels[name] = {"title": title, "counts": sorted(found, key=lambda pair: -pair[1])}
    return {"numbers": numbers, "labels": labels}


def _others(
    table: ClipTable,
    query: Query,
    left_out: Collection[str],
    passing: np.ndarray,
    name: str,
    filtered: Collection[str],
) -> np.ndarray:
    if name not in filtered:
        return passing
    return _passing(table, query, left_out, ignoring=name)[: len(passing)]
