"""Summary of an extraction run, and `failures.jsonl`: all clips that a cache's stores skipped.

The list can be given to training as `train.leave_out`.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from cache_schema import CacheError, SkippedClip, StoreReader, list_stores
from cache_schema.atomic_io import FileLock, add_path_to_errors, open_for_writing, sync
from stages.extract_features.config import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class KindSummary:
    """One store: its clips of the dataset after a run, and what the run did."""

    kind: Kind
    bucket: str | None
    """Size bucket of its clips; None without buckets, and for text."""
    store: Path
    clips_written: int
    """Clips written by this process."""
    clips_already_there: int
    """Clips in finished shards that earlier runs or other processes wrote."""
    skipped: tuple[SkippedClip, ...]
    """Clips skipped by this run and earlier ones, except those that a retry has added since."""
    seconds: float
    """Wall-clock time of this run."""
    bytes: int
    """Size on disk of the clips in finished shards."""
    captions_cut: int = 0
    """Captions in this run that were truncated to the text encoder's length."""

    @property
    def name(self) -> str:
        """The kind, and the size bucket if there are buckets."""
        return self.kind if self.bucket is None else f"{self.kind} {self.bucket}"

    @property
    def clips(self) -> int:
        """Number of clips, including skipped ones."""
        return self.clips_written + self.clips_already_there + len(self.skipped)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSummary:
    """Summary of a whole run."""

    kinds: tuple[KindSummary, ...]
    """In the order in which they were written; one per kind and size."""
    dataset: str
    """The detected dataset layout."""
    failures: Path | None = None
    """List of all skipped clips."""
    notes: tuple[str, ...] = ()
    """Human-readable notes on store contents that do not match the dataset."""

    @property
    def skipped_share(self) -> float:
        """Largest fraction of skipped clips over the kinds, all sizes together; 0 without clips."""
        skipped, clips = Counter[Kind](), Counter[Kind]()
        for of_size in self.kinds:
            skipped[of_size.kind] += len(of_size.skipped)
            clips[of_size.kind] += of_size.clips
        return max(skipped[kind] / max(clips[kind], 1) for kind in clips)


FAILURES_FILE = "failures.jsonl"
_READ_BYTES = 1 << 20


def write_failure_manifest(cache_root: Path, log: Callable[[str], None]) -> Path:
    """Rewrite `<cache_root>/failures.jsonl`, with one JSON object per line.

    A line has `kind`, `store`, `shard`, `source`, `key`, `reason` and `detail`, and lines are
    sorted by these. Clips that a later retry added to the store are not listed. Without failures
    the file is empty; an unchanged file is not rewritten. Concurrent calls are safe: the last one
    has read everything committed before.

    Args:
        cache_root: Folder of the stores.
        log: Called for each store that cannot be read; an unrelated store must not fail the run.

    Returns:
        Path of the file.
    """
    root = Path(cache_root)
    path = root / FAILURES_FILE
    temporary = root / f".{FAILURES_FILE}"
    with FileLock(root / f".{FAILURES_FILE}.lock", wait=True, what=f"the list {path}"):
        with add_path_to_errors(path), open_for_writing(temporary) as file:
            for store in sorted(map(Path, list_stores(root)), key=_by_kind):
                try:
                    reader = StoreReader(store)
                except CacheError as error:
                    log(
                        f"{FAILURES_FILE} does not cover {store.name}: {error}; sam2vx-pipeline "
                        "cache verify says what to do"
                    )
                    continue
                file.writelines(_lines(reader))
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and _are_equal(path, temporary):
            temporary.unlink()
        else:
            temporary.rename(path)
            sync(root)
    return path


def _by_kind(store: Path) -> tuple[str, str]:
    return store.name.rpartition("-")[0], store.name


def _lines(reader: StoreReader) -> Iterator[bytes]:
    """Yield sorted lines, holding at most one shard's in memory."""
    for shard, clips in groupby(reader.iter_skipped(), key=attrgetter("shard")):
        fixed = {
            "kind": reader.settings.kind,
            "store": reader.name,
            "shard": shard,
            "source": reader.shards[shard].source,
        }
        for clip in sorted(clips, key=attrgetter("key", "reason", "detail")):
            line = {**fixed, "key": clip.key, "reason": clip.reason, "detail": clip.detail}
            yield f"{json.dumps(line, ensure_ascii=False)}\n".encode()


def _are_equal(first: Path, second: Path) -> bool:
    if first.stat().st_size != second.stat().st_size:
        return False
    with first.open("rb") as one, second.open("rb") as other:
        while content := one.read(_READ_BYTES):
            if content != other.read(_READ_BYTES):
                return False
    return True


@contextmanager
def failure_manifest_written(cache_root: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Write the manifest when the block ends, also on an error."""
    try:
        yield
    except BaseException as error:
        try:
            write_failure_manifest(cache_root, log)
        except (CacheError, OSError) as problem:
            error.add_note(f"{FAILURES_FILE} could not be written: {problem}")
        raise
    write_failure_manifest(cache_root, log)
