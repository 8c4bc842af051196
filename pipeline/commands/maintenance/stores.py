"""Finding the stores at a path or URL, and running a command on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_schema import CacheError, StoreNotFound, StoreReader, list_stores
from cache_schema.names import STORE_FILE
from cache_schema.storage import is_url, open_storage
from pipeline.console import CommandResult
from pipeline.failures import FAILED, error_text
from stages.extract_features.summary import FAILURES_FILE, write_failure_manifest
from stages.progress import Progress, Task

PathOrUrl = Path | str
"""A local folder, or a URL."""


def path_or_url(text: str) -> PathOrUrl:
    """Parse a command-line argument as a folder or URL."""
    return text.rstrip("/") if is_url(text) else Path(text)


def is_store(location: PathOrUrl) -> bool:
    """Whether this is a store, rather than a folder of stores or nothing."""
    if isinstance(location, Path):
        return (location / STORE_FILE).is_file()
    try:
        open_storage(location).read(STORE_FILE)
    except FileNotFoundError:
        return False
    return True


def store_name(location: PathOrUrl) -> str:
    """The last part of a path or URL."""
    return location.absolute().name if isinstance(location, Path) else location.rpartition("/")[2]


def store_kind(store: PathOrUrl) -> str:
    """The kind of a store according to its name; the whole name if that contains no kind."""
    name = store_name(store)
    return name.rpartition("-")[0] or name


def join(location: PathOrUrl, name: str) -> PathOrUrl:
    """Append a name to a folder or URL."""
    return location / name if isinstance(location, Path) else f"{location}/{name}"


def target_store(target: PathOrUrl, store: str) -> PathOrUrl:
    """Where to write a store of that name: `target` itself if that is a store or has the name, else
    a folder of that name inside it.
    """
    if store_name(target) == store or is_store(target):
        return target
    return join(target, store)


def stores_at(location: PathOrUrl) -> list[PathOrUrl]:
    """The store at `location`, or all stores in that folder, sorted, with or without store.json.

    Raises:
        StoreNotFound: There is none.
        CacheError: A URL does not respond, or its folders cannot be listed.
    """
    if is_store(location):
        return [location]
    stores: list[PathOrUrl] = [*list_stores(location)]
    if isinstance(location, Path):
        # Stores that have lost their store.json must be reported, not skipped silently.
        stores = sorted({*stores, *_without_store_json(location)}, key=str)
    if not stores:
        raise StoreNotFound(
            f"{location} is neither a store nor a folder of stores; sam2vx-pipeline "
            "extract-features writes stores to the folder set by cache=…"
        )
    return stores


def _without_store_json(folder: Path) -> list[Path]:
    """Folders with commit records but no store.json."""
    return [
        commits.parent
        for commits in folder.glob("*/commits")
        if commits.is_dir() and not is_store(commits.parent)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of a command for one store."""

    rows: list[tuple[str, str]]
    """Rows below the store's own row."""
    data: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    failed: bool = False


def run_on_each_store(
    stores: Sequence[PathOrUrl],
    work: Callable[[PathOrUrl], Outcome],
    *,
    title: Callable[[Sequence[Outcome]], str],
    notes: Sequence[str] = (),
) -> CommandResult:
    """Process the stores one by one; an error in one does not stop the others.

    Args:
        stores: Folders or URLs.
        work: Called with each store.
        title: Makes the title from all outcomes.
        notes: Lines printed at the end.
    """
    rows: list[tuple[str, str]] = []
    outcome_notes: list[str] = []
    data: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for store in stores:
        try:
            outcome = work(store)
        except (CacheError, OSError) as error:
            if isinstance(error, StoreNotFound):  # it has shards, but no store.json
                error.remedy = "rewrite"
            text = error_text(error)
            outcome = Outcome(
                rows=[("  failed", "see below")],
                data={"error": text},
                notes=[f"error: {text}"],
                failed=True,
            )
        outcomes.append(outcome)
        rows += [(store_kind(store), str(store)), *outcome.rows]
        outcome_notes += outcome.notes
        data.append({"store": str(store), **outcome.data})
    return CommandResult(
        title=title(outcomes),
        rows=rows,
        data={"stores": data},
        notes=[*dict.fromkeys(outcome_notes), *notes],
        exit_code=FAILED if any(outcome.failed for outcome in outcomes) else 0,
    )


def indented(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Indent rows below a store's own row."""
    return [(f"  {name}", value) for name, value in rows]


@contextmanager
def bytes_bar(progress: Progress, verb: str, *stores: PathOrUrl) -> Iterator[Task]:
    """A progress bar over the bytes of the stores' clips, if they can be counted."""
    try:
        total: int | None = sum(StoreReader(store).num_bytes for store in stores)
    except (CacheError, OSError):
        total = None  # the work itself will report the error
    with progress.task(f"{verb} {store_kind(stores[0])}", total, unit="bytes") as task:
        yield task


def update_failures_file(stores: Iterable[PathOrUrl], progress: Progress) -> None:
    """Update failures.jsonl in the folders of these stores, where it exists."""
    folders = {store.parent for store in stores if isinstance(store, Path)}
    for folder in sorted(folders):
        if (folder / FAILURES_FILE).is_file():
            write_failure_manifest(folder, progress.log)


def pluralize(number: int, what: str) -> str:
    """Format a count with its noun: 1 store, 2 stores."""
    return f"{number} {what}{'' if number == 1 else 's'}"
