"""Derives a Gram-flow store from a store of features, without SAM2: an extraction whose input are
the shards of a store.

The result equals the store that extraction would have written, shard by shard, with the same
names, sources, clips, attributes, fingerprints and skipped clips. Clips whose features were
extracted again from another source are dropped first. These clips, and clips lost in a repair, are
written to retry shards as in extraction.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cache_schema import JSON, ClipEntry, SkippedClip, StoreReader, StoreSettings, StoreWriter
from cache_schema.maintenance.drop import DROPPED, REDO, drop_clips
from cache_schema.maintenance.repair import DAMAGED
from cache_schema.names import StoreLayout, retry_number, without_retry
from cache_schema.records import read_commit
from stages.clips import ClipsConfig, ClipSkipped, retry_shard_name
from stages.extract_features.config import Kind
from stages.extract_features.execution.jobs import next_retry_number, whole_shard_jobs
from stages.extract_features.execution.local_engine import LocalEngine
from stages.extract_features.execution.task import ExtractionTask, run_tasks
from stages.extract_features.extraction import Extracted, Outcome
from stages.extract_features.summary import KindSummary, failure_manifest_written
from stages.progress import Progress
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.encoder import GramFlowEncoder

_Prepared = tuple[ClipEntry, dict[str, np.ndarray]]
"""A clip's entry in the feature store, and its arrays."""


def derive_gram_flow(
    cache_root: Path,
    teacher: Path,
    *,
    config: GramFlowConfig,
    token_grid: tuple[int, int],
    device: torch.device,
    provenance: Mapping[str, JSON],
    progress: Progress,
    rank: int = 0,
    world_size: int = 1,
) -> KindSummary:
    """Write the Gram flow of every clip of a teacher store. Finished shards are not repeated.

    Args:
        cache_root: Folder that the derived store is written to.
        teacher: Folder of the teacher store.
        config: Window and storage of the Gram flow.
        token_grid: Rows and columns of the student's tokens.
        device: Device to compute on.
        provenance: Information on the run, recorded in a store that this run creates.
        progress: Shows bars over the clips, and log lines.
        rank: Rank of this process, which starts with its share of the shards.
        world_size: Number of processes.

    Raises:
        ValueError: The teacher store does not match; raised before any work is done.
        CacheError: A clip or a record is damaged.
    """
    reader = StoreReader(teacher, kind="teacher")
    task = ExtractionTask(_Derivation(reader, config, token_grid))
    (settings,) = task.extraction.settings.values()
    writer = StoreWriter.open(cache_root, settings, provenance=provenance)
    task.writers = {"gram_flow": writer}
    with failure_manifest_written(cache_root, progress.log):
        _drop_changed(reader, writer.path, progress)
        for shards in _stages(reader, writer):
            by_name = {shard.name: shard for shard in shards}
            engine = LocalEngine(
                by_name, lambda record, _: record.fingerprint, device, rank, world_size
            )
            task.plan = whole_shard_jobs(shards, task.writers, earlier=None)
            run_tasks([task], engine, progress)
    writer.write_index()
    writer.write_attributes()
    made = StoreReader(writer.path)
    written = task.report.written["gram_flow"]
    return KindSummary(
        kind="gram_flow",
        bucket=None,
        store=writer.path,
        clips_written=written,
        clips_already_there=len(made) - written,
        skipped=made.skipped,
        seconds=task.seconds,
        bytes=made.num_bytes,
    )


class _Derivation:
    """The extraction: computes the Gram flow of a clip's stored features."""

    size: ClipsConfig | None = None
    clips_per_batch = 1

    def __init__(
        self, reader: StoreReader, config: GramFlowConfig, token_grid: tuple[int, int]
    ) -> None:
        self._reader = reader
        self._encoder = GramFlowEncoder.of(reader.settings, config, token_grid)
        self.settings: Mapping[Kind, StoreSettings] = {"gram_flow": self._encoder.settings}

    def prepare(self, record: ClipEntry | SkippedClip) -> _Prepared:
        """Read the clip's features.

        Raises:
            ClipSkipped: The clip was skipped in the feature store.
        """
        if isinstance(record, SkippedClip):
            raise ClipSkipped(record.reason, record.detail)
        return record, self._reader.read(record.key)

    @contextmanager
    def load_model(
        self, device: torch.device
    ) -> Iterator[Callable[[Sequence[_Prepared]], Sequence[Outcome]]]:
        """Return the computation; there is no model."""

        def extracted(entry: ClipEntry, arrays: dict[str, np.ndarray]) -> Extracted:
            return Extracted(arrays=self._encoder(arrays, device), attributes=entry.attributes)

        yield lambda clips: [{"gram_flow": extracted(*clip)} for clip in clips]


@dataclass(frozen=True, kw_only=True, slots=True)
class _StoredClips:
    """Clips of the feature store as an input shard."""

    name: str
    source: str
    read: Callable[[], Sequence[ClipEntry | SkippedClip]]
    key_prefix: ClassVar[str] = ""
    listed_clips: ClassVar[None] = None

    def num_clips(self) -> int:
        """Number of clips, including skipped ones."""
        return len(self.read())

    def num_bytes(self) -> int:
        """Size of the clips' features."""
        clips = (clip for clip in self.read() if isinstance(clip, ClipEntry))
        return sum(array.bytes for clip in clips for array in clip.arrays.values())

    def records(self) -> Iterator[Any]:
        """Clips in stored order, then skipped ones."""
        return iter(self.read())


def _stages(reader: StoreReader, writer: StoreWriter) -> Iterator[list[_StoredClips]]:
    """Yield the shards to write; each list is planned when those before it are finished.

    Retries follow the shards that have recorded their clips as skipped. Clips that finished shards
    lack come last.
    """
    for _, names in groupby(sorted(reader.shards, key=retry_number), retry_number):
        yield [_whole_shard(reader, name) for name in names]
    missing: dict[str, list[ClipEntry]] = defaultdict(list)
    for key in _missing_keys(reader, StoreReader(writer.path)):
        entry = reader.record(key)
        missing[without_retry(entry.shard)].append(entry)
    yield [
        _retry_shard(reader, name, next_retry_number(name, writer), clips)
        for name, clips in sorted(missing.items())
    ]


def _whole_shard(reader: StoreReader, name: str) -> _StoredClips:
    def read() -> list[ClipEntry | SkippedClip]:
        # The commit record, since a reader omits skipped clips that a retry has added.
        record = read_commit(StoreLayout(Path(reader.path)), reader.settings, name)
        return [*record.clips, *record.skipped]

    return _StoredClips(name=name, source=reader.shards[name].source, read=read)


def _retry_shard(
    reader: StoreReader, shard: str, number: int, clips: Sequence[ClipEntry]
) -> _StoredClips:
    source = reader.shards[shard].source if shard in reader.shards else shard
    return _StoredClips(
        name=retry_shard_name(shard, number),
        source=f"{source}, retry {number}",
        read=lambda: clips,
    )


def _missing_keys(reader: StoreReader, made: StoreReader) -> Iterator[str]:
    """Yield clips of the feature store that the derived store lacks, unless they were dropped."""
    skipped = {clip.key: clip for clip in made.skipped}
    # Merge the sorted keys: looking up a million keys one by one takes half a minute.
    held = iter(reader.keys.in_all(made.keys))
    next_held = next(held, None)
    for key in reader.keys:
        if key == next_held:
            next_held = next(held, None)
        elif key not in skipped or _is_wanted(skipped[key], reader.record(key)):
            yield key


def _is_wanted(skipped: SkippedClip, features: ClipEntry) -> bool:
    """Whether a skipped clip should be derived again, or was skipped for another source."""
    if skipped.reason in (REDO, DAMAGED):
        return True
    return skipped.reason != DROPPED and skipped.fingerprint != features.fingerprint


def _drop_changed(reader: StoreReader, derived: Path, progress: Progress) -> None:
    """Drop the clips whose features are now extracted from another source."""
    made = StoreReader(derived)
    rows = made.keys.rows_of(reader.keys)
    held = rows >= 0
    changed = np.flatnonzero(held)[made.fingerprints[rows[held]] != reader.fingerprints[held]]
    if len(changed):
        detail = "its features were extracted again from another source"
        drop_clips(derived, [reader.keys[int(row)] for row in changed], detail=detail, reason=REDO)
        progress.log(
            f"gram_flow: {len(changed)} clips are derived again, because their features changed"
        )
