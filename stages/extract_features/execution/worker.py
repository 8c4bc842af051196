"""Runs one job at a time with one model: reads ahead, computes, and writes in a thread."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from cache_schema import AlreadyCommitted, ShardBusy, ShardWriter, StoreReader, StoreWriter
from stages.clips import BadRecord, ClipRecord, ClipSkipped, InputShard, is_in_bucket
from stages.extract_features.config import Kind
from stages.extract_features.execution.comparison import compare, has_clip_of
from stages.extract_features.execution.jobs import JobReport, ShardJob, plan_jobs
from stages.extract_features.execution.threads import BackgroundWriter, prefetch_map
from stages.extract_features.extraction import Extracted, Extraction, Outcome, release_memory
from stages.extract_features.fingerprints import read_sources
from stages.extract_features.text import TOKENS_CUT
from stages.progress import SilentProgress

_PREPARE_THREADS = 2

Fingerprint = Callable[[Any, Kind], str]
"""Fingerprint of the entry of a record of the input in a store of a kind."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Clip:
    """A clip being extracted; `kinds` are the stores of its size that still lack it."""

    key: str
    kinds: tuple[Kind, ...]
    fingerprint: str
    """Fingerprint of its inputs in these stores."""
    prepared: Any
    """Result of `Extraction.prepare`, or `ClipSkipped`."""

    @property
    def needs_model(self) -> bool:
        return bool(self.kinds) and not isinstance(self.prepared, ClipSkipped)


class ShardWorker:
    """Writes shards of one extraction's stores; the model is loaded when first needed.

    Args:
        extraction: The extraction.
        writers: Stores of the extraction.
        shards: The input's shards by name.
        fingerprint: Returns the fingerprint of a record's entry in a store of a kind.
        device: Device to compute on.
        advance: Called with a job and a number of processed clips, including skipped ones.
        log: Called with a line for every skipped clip.
    """

    def __init__(
        self,
        extraction: Extraction,
        writers: Mapping[Kind, StoreWriter],
        shards: Mapping[str, InputShard],
        fingerprint: Fingerprint,
        device: torch.device,
        *,
        advance: Callable[[ShardJob, int], None],
        log: Callable[[str], None],
    ) -> None:
        self._extraction = extraction
        self._writers = writers
        self._shards = shards
        self._fingerprint_of = fingerprint
        self._device = device
        self._advance = advance
        self._log = log
        self._model = ExitStack()
        self._extract: Callable[[Sequence[Any]], Sequence[Outcome]] | None = None
        self._readers: dict[Path, StoreReader] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the model."""
        self._extract = None
        self._model.close()
        release_memory()

    def work(self, job: ShardJob, report: JobReport) -> None:
        """Write and commit a shard in every store that lacks it, and add the results to `report`.

        Nothing is added to a store whose shard other processes wrote first.

        Raises:
            ShardBusy: Another process is writing the shard; nothing was written.
        """
        remaining = self._compare(job, report)
        if remaining is not None:
            with ExitStack() as held:
                outs = self._open_shards(remaining, held)
                if outs:
                    self._write_shards(remaining, outs, report)

    def _compare(self, job: ShardJob, report: JobReport) -> ShardJob | None:
        """Return the job without clips that stores have in other shards; None if none is left."""
        if job.earlier is None:
            return job
        for kind in job.keys:
            if self._writers[kind].is_busy(job.name):
                raise ShardBusy(f"another process is writing shard {job.name!r}")
        shard = self._shards[job.input_name]
        readers = [
            (kind, self._reader(path)) for kind, of in job.earlier.paths.items() for path in of
        ]
        if not has_clip_of((reader for _, reader in readers), shard):
            return job
        sources = read_sources([shard], tuple(self._writers), job.earlier.teacher, SilentProgress())
        found = compare(readers, sources)
        if found.has_changes:
            report.changed_shards.add(shard.name)
        plan = plan_jobs(
            [shard],
            self._writers,
            found,
            size=job.earlier.size,
            retry_failed=job.earlier.retry_failed,
        )
        whole = next((one for one in plan.jobs if one.name == job.name), None)
        if whole is None:
            report.settled_jobs.add(job.name)
        return whole

    def _reader(self, path: Path) -> StoreReader:
        """Return a store's reader, opened once per worker: a large store takes seconds to open."""
        if path not in self._readers:
            self._readers[path] = StoreReader(path)
        return self._readers[path]

    def _open_shards(self, job: ShardJob, held: ExitStack) -> dict[Kind, ShardWriter]:
        outs = {}
        is_current = _IsCurrent(lambda: self._fingerprints(job))
        for kind in job.keys:
            if not self._writers[kind].is_committed(job.name):
                out = self._writers[kind].shard(job.name, source=job.source, is_current=is_current)
                try:
                    outs[kind] = held.enter_context(out)
                except AlreadyCommitted:  # committed since the check above
                    continue
        return outs

    def _fingerprints(self, job: ShardJob) -> dict[str, str]:
        return {record.key: self._fingerprint(record) for record in job.records(self._shards)}

    def _fingerprint(self, record: ClipRecord | BadRecord) -> str:
        return self._fingerprint_of(record, next(iter(self._writers)))

    def _write_shards(
        self, job: ShardJob, outs: dict[Kind, ShardWriter], report: JobReport
    ) -> None:
        outcome_writer = _OutcomeWriter(outs, job.source, self._log)
        size = self._extraction.clips_per_batch
        with (
            BackgroundWriter(outcome_writer.write) as writer,
            closing(self._prepare_clips(job, outs, ahead=size)) as clips,
        ):
            for batch in _batches(clips, size):
                for clip, outcome in zip(batch, self._outcomes(batch, job), strict=True):
                    if outcome is not None:
                        writer.put((clip, outcome))
                self._advance(job, len(batch))
            writer.drain()
            for out in outs.values():
                out.commit()
        report.captions_cut += outcome_writer.captions_cut
        report.written += outcome_writer.written

    def _prepare_clips(
        self, job: ShardJob, outs: Mapping[Kind, ShardWriter], *, ahead: int
    ) -> Generator[_Clip, None, None]:
        def prepare(record: ClipRecord | BadRecord) -> _Clip:
            kinds = tuple(
                kind for kind, out in outs.items() if _is_missing(out, job, kind, record.key)
            )
            if kinds and not self._has_this_size(record, job):
                kinds = ()
            fingerprint = self._fingerprint(record) if kinds else ""
            prepared = self._prepare(record, job.source) if kinds else None
            return _Clip(key=record.key, kinds=kinds, fingerprint=fingerprint, prepared=prepared)

        return prefetch_map(
            prepare,
            job.records(self._shards),
            ahead=ahead,
            threads=_PREPARE_THREADS,
            describe=lambda record: f"decoding clip {record.key!r} of {job.source}",
        )

    def _has_this_size(self, record: ClipRecord | BadRecord, job: ShardJob) -> bool:
        """Whether the clip has the size of these stores; retried clips are known to."""
        size = self._extraction.size
        return size is None or record.key in job.retried or is_in_bucket(record, size)

    def _prepare(self, record: ClipRecord | BadRecord, source: str) -> Any:
        if isinstance(record, BadRecord):
            return ClipSkipped(record.reason, record.detail)
        try:
            return self._extraction.prepare(record)
        except ClipSkipped as skipped:
            return skipped
        except Exception as error:
            error.add_note(f"while preparing clip {record.key!r} of {source}")
            raise

    def _outcomes(self, batch: Sequence[_Clip], job: ShardJob) -> list[Outcome | None]:
        """Return the outcome of each clip; None if no store lacks it."""
        computed = iter(self._compute([clip for clip in batch if clip.needs_model], job))
        return [
            next(computed) if clip.needs_model else clip.prepared if clip.kinds else None
            for clip in batch
        ]

    def _compute(self, clips: Sequence[_Clip], job: ShardJob) -> Sequence[Outcome]:
        if not clips:
            return []
        try:
            if self._extract is None:
                self._extract = self._model.enter_context(self._extraction.load_model(self._device))
            outcomes = self._extract([clip.prepared for clip in clips])
        except Exception as error:
            kinds, keys = " and ".join(job.keys), ", ".join(repr(clip.key) for clip in clips)
            error.add_note(f"while extracting {kinds} of clip {keys} in {job.source}")
            raise
        assert len(outcomes) == len(clips)
        return outcomes


class _IsCurrent:
    """Checks that staged clips match the dataset, whose fingerprints are read on first use."""

    def __init__(self, read: Callable[[], dict[str, str]]) -> None:
        self._read = read
        self._fingerprints: dict[str, str] | None = None

    def __call__(self, key: str, fingerprint: str) -> bool:
        if self._fingerprints is None:
            self._fingerprints = self._read()
        return self._fingerprints.get(key) == fingerprint


def _is_missing(out: ShardWriter, job: ShardJob, kind: Kind, key: str) -> bool:
    """Whether a store still lacks a clip; other processes may have written it meanwhile."""
    return job.wants(kind, key) and not out.has(key) and out.shard_holding(key) is None


def _batches(clips: Iterable[_Clip], size: int) -> Iterator[list[_Clip]]:
    """Yield the clips in order, in lists with at most `size` clips that need the model.

    Clips that do not need it wait only for those before them.
    """
    batch: list[_Clip] = []
    num_for_model = 0
    for clip in clips:
        batch.append(clip)
        num_for_model += clip.needs_model
        if num_for_model in (0, size):
            yield batch
            batch, num_for_model = [], 0
    if batch:
        yield batch


class _OutcomeWriter:
    """Writes outcomes into the open shards, and counts the clips added."""

    def __init__(
        self, outs: Mapping[Kind, ShardWriter], source: str, log: Callable[[str], None]
    ) -> None:
        self.written: Counter[Kind] = Counter()
        self.captions_cut = 0
        self._outs = outs
        self._source = source
        self._log = log

    def write(self, entry: tuple[_Clip, Outcome]) -> None:
        clip, outcome = entry
        try:
            if isinstance(outcome, ClipSkipped):
                self._skip(clip, clip.kinds, outcome)
                return
            for kind in clip.kinds:
                self._add(clip, kind, outcome[kind])
        except Exception as error:
            kinds = " and ".join(clip.kinds)
            error.add_note(f"while writing {kinds} of clip {clip.key!r} in {self._source}")
            raise

    def _add(self, clip: _Clip, kind: Kind, extracted: Extracted) -> None:
        if not all(np.isfinite(values).all() for values in extracted.arrays.values()):
            # Without the array's name, so that a derived store has the same detail.
            detail = "NaN or values beyond float16; fp32 precision may help"
            self._skip(clip, (kind,), ClipSkipped("not_finite", detail))
            return
        self._outs[kind].add(
            clip.key, extracted.arrays, extracted.attributes, fingerprint=clip.fingerprint
        )
        self.written[kind] += 1
        self.captions_cut += bool(extracted.attributes.get(TOKENS_CUT))

    def _skip(self, clip: _Clip, kinds: tuple[Kind, ...], skipped: ClipSkipped) -> None:
        for kind in kinds:
            self._outs[kind].skip(
                clip.key, skipped.reason, skipped.detail, fingerprint=clip.fingerprint
            )
        self._log(f"{', '.join(kinds)}: skipped {clip.key}, {skipped.reason}: {skipped.detail}")
