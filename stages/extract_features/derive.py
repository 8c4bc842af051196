"""Derives a Gram-flow store from a store of features, without SAM2.

The result equals the store that extraction would have written, shard by shard, with the same
names, sources, clips, attributes, fingerprints and skipped clips. Clips whose features were
extracted again from another source are dropped first. These clips, and clips lost in a repair, are
written to retry shards as in extraction. Several processes may share the work: the holder of a
shard's lock writes it, and the others wait for it at the end.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cache_schema import (
    JSON,
    AlreadyCommitted,
    ClipEntry,
    ShardBusy,
    ShardWriter,
    SkippedClip,
    StoreReader,
    StoreWriter,
)
from cache_schema.maintenance.drop import DROPPED, REDO, drop_clips
from cache_schema.maintenance.repair import DAMAGED
from cache_schema.names import StoreLayout, without_retry
from cache_schema.records import read_commit
from stages.clips import retry_shard_name
from stages.extract_features.execution.jobs import next_retry_number
from stages.extract_features.execution.local_engine import wait_for_others
from stages.extract_features.execution.threads import prefetch_map
from stages.progress import Progress, Task
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.encoder import GramFlowEncoder


@dataclass(frozen=True, kw_only=True, slots=True)
class DeriveSummary:
    """Contents of the derived store after a run, and what the run did."""

    store: Path
    clips_written: int
    """Clips written by this process."""
    clips_already_there: int
    """Clips in finished shards that earlier runs or other processes wrote."""
    skipped: tuple[SkippedClip, ...]
    """Clips skipped in the feature store or dropped from this one."""
    seconds: float
    """Wall-clock time of this run."""
    bytes: int
    """Size on disk of the clips in finished shards."""


def derive_gram_flow(
    cache_root: Path,
    teacher: Path,
    *,
    config: GramFlowConfig,
    token_grid: tuple[int, int],
    device: torch.device,
    provenance: Mapping[str, JSON],
    progress: Progress,
) -> DeriveSummary:
    """Write the Gram flow of every clip of a teacher store. Finished shards are not repeated.

    Args:
        cache_root: Folder that the derived store is written to.
        teacher: Folder of the teacher store.
        config: Window and storage of the Gram flow.
        token_grid: Rows and columns of the student's tokens.
        device: Device to compute on.
        provenance: Information on the run, recorded in a store that this run creates.
        progress: Shows a bar over the clips.

    Raises:
        ValueError: The teacher store does not match; raised before any work is done.
        CacheError: A clip or a record is damaged.
    """
    started = time.perf_counter()
    reader = StoreReader(teacher, kind="teacher")
    maker = GramFlowEncoder.of(reader.settings, config, token_grid)
    writer = StoreWriter.open(cache_root, maker.settings, provenance=provenance)
    _drop_changed(reader, writer.path, progress)
    with progress.task("gram_flow", len(reader), unit="clips") as task:
        derivation = _Derivation(reader, writer, maker, device, task)
        remaining = list(reader.shards)
        while remaining := [shard for shard in remaining if not derivation.derive(shard)]:
            wait_for_others(partial(derivation.unfinished, remaining), progress)
        while missing := derivation.derive_missing():
            wait_for_others(partial(derivation.unfinished, missing), progress)
    writer.write_index()
    made = StoreReader(writer.path)
    return DeriveSummary(
        store=writer.path,
        clips_written=derivation.clips_written,
        clips_already_there=len(made) - derivation.clips_written,
        skipped=tuple(made.skipped),
        seconds=time.perf_counter() - started,
        bytes=made.num_bytes,
    )


class _Derivation:
    """Derives the shards of one store."""

    def __init__(
        self,
        reader: StoreReader,
        writer: StoreWriter,
        maker: GramFlowEncoder,
        device: torch.device,
        task: Task,
    ) -> None:
        self._reader = reader
        self._layout = StoreLayout(Path(reader.path))
        self._writer = writer
        self._finished = StoreReader(writer.path).shards
        self._maker = maker
        self._device = device
        self._task = task
        self.clips_written = 0

    def derive(self, shard: str) -> bool:
        """Finish a shard; return False if another process is writing it."""
        if shard in self._finished or self._writer.is_committed(shard):
            self._task.advance(self._reader.shards[shard].num_clips)
            return True
        # The commit record, since a reader omits skipped clips that a retry has added.
        record = read_commit(self._layout, self._reader.settings, shard)
        return self._write(shard, record.source, record.clips, record.skipped)

    def unfinished(self, shards: Sequence[str]) -> dict[str, bool]:
        """Return the unfinished shards among some, and whether another process writes each."""
        writer = self._writer
        return {name: writer.is_busy(name) for name in shards if not writer.is_committed(name)}

    def derive_missing(self) -> list[str]:
        """Derive the clips that finished shards lack; return shards that other processes write."""
        missing: dict[str, list[ClipEntry]] = defaultdict(list)
        for key in self._missing_keys():
            entry = self._reader.record(key)
            missing[without_retry(entry.shard)].append(entry)
        remaining = []
        for shard, clips in sorted(missing.items()):
            attempt = next_retry_number(shard, self._writer)
            name = retry_shard_name(shard, attempt)
            origin = self._reader.shards[shard].source if shard in self._reader.shards else shard
            if not self._write(name, f"{origin}, retry {attempt}", clips, ()):
                remaining.append(name)
        return remaining

    def _missing_keys(self) -> Iterator[str]:
        """Yield clips of the feature store that this store lacks, unless they were dropped."""
        made = StoreReader(self._writer.path)
        skipped = {clip.key: clip for clip in made.skipped}
        # Merge the sorted keys: looking up a million keys one by one takes half a minute.
        held = iter(self._reader.keys.in_all(made.keys))
        next_held = next(held, None)
        for key in self._reader.keys:
            if key == next_held:
                next_held = next(held, None)
            elif key not in skipped or self._is_wanted(skipped[key]):
                yield key

    def _is_wanted(self, skipped: SkippedClip) -> bool:
        """Whether a skipped clip should be derived again, or was skipped for another source."""
        if skipped.reason in (REDO, DAMAGED):
            return True
        made_from = self._reader.record(skipped.key).fingerprint
        return skipped.reason != DROPPED and skipped.fingerprint != made_from

    def _write(
        self, shard: str, source: str, clips: Sequence[ClipEntry], skipped: Sequence[SkippedClip]
    ) -> bool:
        """Write a shard unless it is finished; return False if another process is writing it."""
        listed: list[ClipEntry | SkippedClip] = [*skipped, *clips]
        made_from = {clip.key: clip.fingerprint for clip in listed}
        try:
            with self._writer.shard(
                shard,
                source=source,
                is_current=lambda key, fingerprint: made_from.get(key) == fingerprint,
            ) as out:
                self._add(out, clips)
                for clip in skipped:
                    out.skip(clip.key, clip.reason, clip.detail, fingerprint=clip.fingerprint)
                out.commit()
        except ShardBusy:
            return False
        except AlreadyCommitted:  # committed since it was found to be missing
            self._task.advance(len(clips))
        return True

    def _add(self, out: ShardWriter, clips: Sequence[ClipEntry]) -> None:
        # Another shard may hold it, if the feature store has it in a different retry shard.
        missing = [
            clip for clip in clips if not out.has(clip.key) and out.shard_holding(clip.key) is None
        ]
        self._task.advance(len(clips) - len(missing))
        arrays_ahead = prefetch_map(
            self._reader.read,
            [clip.key for clip in missing],
            ahead=1,
            threads=1,
            describe=lambda key: f"reading clip {key!r}",
        )
        with closing(arrays_ahead):
            for clip, arrays in zip(missing, arrays_ahead, strict=True):
                made = self._maker(arrays, self._device)
                out.add(clip.key, made, clip.attributes, fingerprint=clip.fingerprint)
                self.clips_written += 1
                self._task.advance(1)


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
