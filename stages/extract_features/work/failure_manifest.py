"""Lists every clip that the stores of a cache left out, and why; written at the end of each run.

Training reads such a list (`train.leave_out`), people read it, and `--retry-failed` makes it
shorter.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_schema import CacheError, StoreReader, list_stores
from cache_schema.durable import write_whole
from cache_schema.lock import FileLock

FAILURES_FILE = "failures.jsonl"


def write_failure_manifest(cache_root: Path, log: Callable[[str], None]) -> Path:
    """Write `<cache_root>/failures.jsonl` anew, as a whole: one JSON object per line.

    A line has `kind`, `store`, `shard`, `source`, `key`, `reason` and `detail`; the lines are
    sorted by these. Clips that a later retry brought into the store are not listed. No failure is
    an empty file; a list that would not change is not touched. Several processes may do this at
    once: the last one has seen all that was committed before.

    Args:
        cache_root: Folder of the stores.
        log: Told of stores that cannot be read: one that this run has nothing to do with must not
            spoil its end.

    Returns:
        The file.
    """
    root = Path(cache_root)
    path = root / FAILURES_FILE
    with FileLock(root / f".{FAILURES_FILE}.lock", wait=True, what=f"the list {path}"):
        lines = []
        for store in map(Path, list_stores(root)):
            try:
                lines += _lines(store)
            except CacheError as error:
                log(f"{FAILURES_FILE} says nothing of {store.name}: {error}")
        text = "".join(f"{json.dumps(dict(line), ensure_ascii=False)}\n" for line in sorted(lines))
        content = text.encode("utf-8")
        if not path.is_file() or path.read_bytes() != content:
            write_whole(path, content, temporary=root / f".{FAILURES_FILE}")
    return path


def _lines(store: Path) -> list[tuple[tuple[str, str], ...]]:
    reader = StoreReader(store)
    return [
        (
            ("kind", reader.settings.kind),
            ("store", store.name),
            ("shard", clip.shard),
            ("source", reader.shards[clip.shard].source),
            ("key", clip.key),
            ("reason", clip.reason),
            ("detail", clip.detail),
        )
        for clip in reader.skipped
    ]


@contextmanager
def failures_listed(cache_root: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Write the manifest when the block ends, also when it ends with an error."""
    try:
        yield
    except BaseException as error:
        try:
            write_failure_manifest(cache_root, log)
        except (CacheError, OSError) as problem:
            error.add_note(f"{FAILURES_FILE} could not be written: {problem}")
        raise
    write_failure_manifest(cache_root, log)
