"""Which stores a path means, and one command's work on each of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_schema import CacheError, StoreNotFound, StoreReader, list_stores
from cache_schema.names import STORE_FILE
from cache_schema.storage import is_url, open_place
from pipeline.console import Answer
from pipeline.failures import FAILED, in_words
from stages.extract_features.execution.failures import FAILURES_FILE, write_failure_manifest
from stages.progress import Progress, Task

Where = Path | str
"""A folder, or a URL."""

_HEADLESS = (
    "if it is a copy, copy it again; else run sam2vx-pipeline extract-features with the "
    "configuration it was made with, which writes that file again and keeps every shard"
)


def place_of(text: str) -> Where:
    """The folder or URL that an argument names."""
    return text.rstrip("/") if is_url(text) else Path(text)


def is_store(where: Where) -> bool:
    """Whether this is one store, rather than a folder of them or nothing."""
    if isinstance(where, Path):
        return (where / STORE_FILE).is_file()
    try:
        open_place(where).read(STORE_FILE)
    except FileNotFoundError:
        return False
    return True


def name_of(where: Where) -> str:
    """The last part of a folder or URL: what a store is called."""
    return where.absolute().name if isinstance(where, Path) else where.rpartition("/")[2]


def kind_of(store: Where) -> str:
    """The kind of a store, going by its name; the whole name where that says none."""
    name = name_of(store)
    return name.rpartition("-")[0] or name


def within(where: Where, name: str) -> Where:
    """The folder or URL of that name inside another."""
    return where / name if isinstance(where, Path) else f"{where}/{name}"


def target_of(target: Where, store: str) -> Where:
    """Where a store of that name is to go.

    To `target` itself if that is a store or has the name; else into it, under the name.
    """
    if name_of(target) == store or is_store(target):
        return target
    return within(target, store)


def stores_at(where: Where) -> list[Where]:
    """The store at `where`, or all stores in that folder, sorted; ones without store.json too.

    Raises:
        StoreNotFound: There is none.
        CacheError: A URL does not answer, or is one whose folders cannot be listed.
    """
    if is_store(where):
        return [where]
    stores: list[Where] = [*list_stores(where)]
    if isinstance(where, Path):
        # What is a store but for its store.json must not be passed over in silence.
        stores = sorted({*stores, *_headless(where)}, key=str)
    if not stores:
        raise StoreNotFound(
            f"{where} is neither a store nor a folder of stores; sam2vx-pipeline extract-features "
            "makes them in the folder that cache=… names"
        )
    return stores


def _headless(folder: Path) -> list[Path]:
    """Folders that hold commit records and no store.json."""
    return [
        commits.parent
        for commits in folder.glob("*/commits")
        if commits.is_dir() and not is_store(commits.parent)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one store."""

    rows: list[tuple[str, str]]
    """Under the store's own row."""
    data: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    failed: bool = False


def each_store(
    stores: Sequence[Where],
    work: Callable[[Where], Outcome],
    *,
    title: Callable[[Sequence[Outcome]], str],
    notes: Sequence[str] = (),
) -> Answer:
    """Do the work on one store after the other; what is wrong with one does not stop the rest.

    Args:
        stores: Folders or URLs.
        work: Told one of them.
        title: Sums the outcomes up.
        notes: Lines for the end.
    """
    rows: list[tuple[str, str]] = []
    told: list[str] = []
    data: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for store in stores:
        try:
            outcome = work(store)
        except (CacheError, OSError) as error:
            remedy = f"; {_HEADLESS}" if isinstance(error, StoreNotFound) else ""
            outcome = Outcome(
                rows=[("  failed", "see below")],
                data={"error": f"{in_words(error)}{remedy}"},
                notes=[f"error: {in_words(error)}{remedy}"],
                failed=True,
            )
        outcomes.append(outcome)
        rows += [(kind_of(store), str(store)), *outcome.rows]
        told += outcome.notes
        data.append({"store": str(store), **outcome.data})
    return Answer(
        title=title(outcomes),
        rows=rows,
        data={"stores": data},
        notes=[*dict.fromkeys(told), *notes],
        exit_code=FAILED if any(outcome.failed for outcome in outcomes) else 0,
    )


def indented(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows as they stand under a store's own."""
    return [(f"  {name}", value) for name, value in rows]


@contextmanager
def bar_of_bytes(progress: Progress, verb: str, *stores: Where) -> Iterator[Task]:
    """A bar as long as the stores' clips are big, where that can be known."""
    try:
        total: int | None = sum(StoreReader(store).num_bytes for store in stores)
    except (CacheError, OSError):
        total = None  # the work itself will say what is wrong
    with progress.task(f"{verb} {kind_of(stores[0])}", total, unit="bytes") as task:
        yield task


def list_failures_again(stores: Iterable[Where], progress: Progress) -> None:
    """Bring failures.jsonl up to date in the folders of these stores, where there is one."""
    folders = {store.parent for store in stores if isinstance(store, Path)}
    for folder in sorted(folders):
        if (folder / FAILURES_FILE).is_file():
            write_failure_manifest(folder, progress.log)


def counted(number: int, what: str) -> str:
    """Write a number of things: 1 store, 2 stores."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def command(*words: Where) -> str:
    """A command of this program, to be copied from the screen."""
    return shlex.join(["sam2vx-pipeline", *map(str, words)])
