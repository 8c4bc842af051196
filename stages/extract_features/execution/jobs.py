"""Extraction jobs, one per shard, and their planning."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from cache_schema import SortedText, StoreWriter
from stages.clips import BadRecord, ClipRecord, InputShard, retry_shard_name
from stages.extract_features.config import Kind, TeacherConfig
from stages.extract_features.execution.comparison import Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierStores:
    """Existing stores of a job's kinds; plain data, sent to workers."""

    paths: Mapping[Kind, tuple[Path, ...]]
    """Stores of every size, by kind."""
    size: int
    """Index of the size that the job writes."""
    retry_failed: bool
    """Retry skipped clips."""
    teacher: TeacherConfig
    """Sources of prompts, which fingerprints cover."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """A shard to write in the stores of one extraction; plain data, sent to workers."""

    input_name: str
    """Shard of the input to read."""
    name: str
    """Shard of the stores to write."""
    source: str
    keys: Mapping[Kind, frozenset[str] | None]
    """Kinds of stores to write, and the clips of the input shard; None for all clips."""
    excluded: Mapping[Kind, frozenset[str]] = field(default_factory=dict)
    """Clips to exclude from all: they are settled in other shards of the store."""
    retried: frozenset[str] = frozenset()
    """Clips that the stores of this size have skipped; they are known to have this size."""
    earlier: "EarlierStores | None" = None
    """Stores to compare the shard with first; None if it was compared or all stores are empty."""

    def wants(self, kind: Kind, key: str) -> bool:
        """Whether to write a clip into the store of a kind."""
        keys = self.keys[kind]
        return key not in self.excluded.get(kind, ()) if keys is None else key in keys

    def is_pending(self, writers: Mapping[Kind, StoreWriter]) -> bool:
        """Whether a store still lacks the shard."""
        return not all(writers[kind].is_committed(self.name) for kind in self.keys)

    def listed_clips(self, shards: Mapping[str, InputShard]) -> int | None:
        """Return the number of clips, or None if unknown without reading the shard."""
        if None in self.keys.values():
            return shards[self.input_name].listed_clips
        return len(self._listed_keys())

    def records(self, shards: Mapping[str, InputShard]) -> Iterator[ClipRecord | BadRecord]:
        """Yield the job's clips in the order of the input shard."""
        wanted = None if None in self.keys.values() else self._listed_keys()
        for record in shards[self.input_name].records():
            if wanted is None or record.key in wanted:
                yield record

    def _listed_keys(self) -> frozenset[str]:
        return frozenset().union(*(keys for keys in self.keys.values() if keys is not None))


@dataclass(kw_only=True, slots=True)
class JobReport:
    """Results of jobs of one extraction; plain data, sent by workers."""

    written: Counter[Kind] = field(default_factory=Counter)
    """Clips added to each store."""
    captions_cut: int = 0
    """Captions truncated by the text encoder."""
    settled_jobs: set[str] = field(default_factory=set)
    """Names of jobs with nothing to do: no store lacked a clip."""
    changed_shards: set[str] = field(default_factory=set)
    """Names of dataset shards for which a store has a clip from another source."""

    def add(self, other: "JobReport") -> None:
        """Add the results of another run."""
        self.written += other.written
        self.captions_cut += other.captions_cut
        self.settled_jobs |= other.settled_jobs
        self.changed_shards |= other.changed_shards


def pending_jobs(jobs: Iterable[ShardJob], writers: Mapping[Kind, StoreWriter]) -> list[ShardJob]:
    """Return the jobs whose shard a store still lacks; lists each store's shards once."""
    finished = {kind: writer.committed() for kind, writer in writers.items()}
    return [job for job in jobs if not all(job.name in finished[kind] for kind in job.keys)]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlan:
    """The jobs of one extraction."""

    jobs: Sequence[ShardJob]
    num_settled: int
    """Clips of the dataset that are in none of the jobs."""


def whole_shard_jobs(
    shards: Sequence[InputShard], kinds: Iterable[Kind], earlier: EarlierStores | None
) -> JobPlan:
    """Return a job per shard; its worker compares the shard with the stores first."""
    jobs = [
        ShardJob(
            input_name=shard.name,
            name=shard.name,
            source=shard.source,
            keys=dict.fromkeys(kinds),
            earlier=earlier,
        )
        for shard in shards
    ]
    return JobPlan(jobs=jobs, num_settled=0)


def plan_jobs(
    shards: Sequence[InputShard],
    writers: Mapping[Kind, StoreWriter],
    comparison: Comparison,
    *,
    size: int = 0,
    retry_failed: bool = False,
) -> JobPlan:
    """Plan jobs for the shards that the stores of one extraction lack, and for missing clips.

    A finished shard is never written again: clips that it lacks go into a retry shard
    `<name>-retry<number>`. A shard without missing clips needs no job, whatever its name: rows may
    have moved from one shard to another.

    Args:
        shards: The compared shards, in the order of `comparison.sources`.
        writers: The stores of the extraction.
        comparison: Comparison of the shards with all stores.
        size: Index of the stores' size.
        retry_failed: Retry skipped clips.
    """
    return _Plan(shards, writers, comparison, size, retry_failed).build()


class _Plan:
    """Planning of one extraction's jobs for compared shards."""

    def __init__(
        self,
        shards: Sequence[InputShard],
        writers: Mapping[Kind, StoreWriter],
        comparison: Comparison,
        size: int,
        retry_failed: bool,
    ) -> None:
        assert comparison.sources is not None
        self._shards = shards
        self._writers = writers
        self._keys: SortedText = comparison.sources.keys
        shard_N = comparison.sources.shard_N
        # Rows in the order of shards, and the start of each shard.
        self._rows = np.argsort(shard_N, kind="stable")
        self._starts = np.searchsorted(shard_N[self._rows], np.arange(len(shards) + 1))
        self._wanted_by_kind: dict[Kind, np.ndarray] = {}
        self._retried_N = np.zeros(len(shard_N), bool)
        for kind in writers:
            found = comparison.kinds[kind]
            self._wanted_by_kind[kind] = found.wanted_N(size, retry_failed=retry_failed)
            if retry_failed:
                self._retried_N |= found.retried_N(size)

    def build(self) -> JobPlan:
        """Return jobs for whole shards, followed by retry jobs."""
        whole: list[ShardJob] = []
        retries: list[ShardJob] = []
        num_settled = 0
        for index, shard in enumerate(self._shards):
            missing = [
                kind
                for kind, wanted_N in self._wanted_by_kind.items()
                if wanted_N[self._rows_of(index)].any()
            ]
            new = [kind for kind in missing if not self._writers[kind].is_committed(shard.name)]
            if new:
                whole.append(self._whole_shard_job(index, shard, new))
            else:
                wanted = [self._wanted_by_kind[kind][self._rows_of(index)] for kind in missing]
                none = np.zeros(len(self._rows_of(index)), bool)
                num_settled += int(np.count_nonzero(~np.logical_or.reduce([none, *wanted])))
            retries += self._retry_jobs(index, shard, [kind for kind in missing if kind not in new])
        return JobPlan(jobs=[*whole, *retries], num_settled=num_settled)

    def _rows_of(self, index: int) -> np.ndarray:
        return self._rows[self._starts[index] : self._starts[index + 1]]

    def _keys_in(self, index: int, mask_N: np.ndarray) -> frozenset[str]:
        rows = self._rows_of(index)
        return frozenset(self._keys[int(row)] for row in rows[mask_N[rows]])

    def _whole_shard_job(self, index: int, shard: InputShard, kinds: Sequence[Kind]) -> ShardJob:
        return ShardJob(
            input_name=shard.name,
            name=shard.name,
            source=shard.source,
            keys=dict.fromkeys(kinds),
            excluded={kind: self._keys_in(index, ~self._wanted_by_kind[kind]) for kind in kinds},
            retried=self._keys_in(index, self._retried_N),
        )

    def _retry_jobs(
        self, index: int, shard: InputShard, kinds: Sequence[Kind]
    ) -> Iterator[ShardJob]:
        """Yield a job per retry number, shared by stores with as many retry shards."""
        by_number: dict[int, dict[Kind, frozenset[str] | None]] = defaultdict(dict)
        for kind in kinds:
            number = next_retry_number(shard.name, self._writers[kind])
            by_number[number][kind] = self._keys_in(index, self._wanted_by_kind[kind])
        for number, keys in sorted(by_number.items()):
            yield ShardJob(
                input_name=shard.name,
                name=retry_shard_name(shard.name, number),
                source=f"{shard.source}, retry {number}",
                keys=keys,
                retried=self._keys_in(index, self._retried_N),
            )


def next_retry_number(name: str, writer: StoreWriter) -> int:
    """Return the number of the first unfinished retry shard."""
    number = 1
    while writer.is_committed(retry_shard_name(name, number)):
        number += 1
    return number


_Item = TypeVar("_Item")


def rank_order(jobs: Sequence[_Item], rank: int, world_size: int) -> list[_Item]:
    """Return the order in which a worker takes jobs or shards: its own share, then the others'.

    Other workers process their shares from the front, so theirs are taken from the back.
    """
    order = list(jobs[rank::world_size])
    for step in range(1, world_size):
        order += reversed(jobs[(rank + step) % world_size :: world_size])
    return order
