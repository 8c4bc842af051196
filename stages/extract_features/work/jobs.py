"""What is to be done with which shard; planned once per run, carried out by the engines."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cache_schema import StoreReader, StoreWriter
from cache_schema.layout import retry_number
from cache_schema.upkeep.drop import DROPPED
from stages.clips import (
    BadRecord,
    ClipDataset,
    ClipRecord,
    InputShard,
    input_shard_name,
    retry_shard_name,
)
from stages.extract_features.config import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """One shard to be written in the stores of one extraction; plain data, sent to workers."""

    input_name: str
    """The dataset's shard that is read."""
    name: str
    """The stores' shard that is written."""
    source: str
    keys: Mapping[Kind, frozenset[str]]
    """The stores it concerns; and of which clips, where it is a retry."""
    is_retry: bool

    def wants(self, kind: Kind, key: str) -> bool:
        """Whether a clip is to be written into the store of a kind."""
        return not self.is_retry or key in self.keys[kind]

    def has_retry(self, shard: str) -> bool:
        """Whether a store's shard is a retry of this one."""
        return shard == retry_shard_name(self.name, retry_number(shard))

    def is_pending(self, writers: Mapping[Kind, StoreWriter]) -> bool:
        """Whether a store still lacks the shard, as of now."""
        return not all(writers[kind].is_committed(self.name) for kind in self.keys)

    def num_clips(self, shards: Mapping[str, InputShard]) -> int:
        """How many clips it goes through; may read the headers of a tar."""
        if self.is_retry:
            return len(frozenset().union(*self.keys.values()))
        return shards[self.input_name].num_clips()

    def records(self, shards: Mapping[str, InputShard]) -> Iterator[ClipRecord | BadRecord]:
        """What the shard holds; of a retry, its clips, also those that have left the dataset."""
        records = shards[self.input_name].records()
        if not self.is_retry:
            yield from records
            return
        left = set().union(*self.keys.values())
        for record in records:
            if record.key in left:
                left.remove(record.key)
                yield record
        for key in sorted(left):
            yield BadRecord(
                key=key, reason="bad_record", detail="the dataset no longer holds this clip"
            )


def plan_jobs(
    dataset: ClipDataset, writers: Mapping[Kind, StoreWriter], *, retry_failed: bool
) -> list[ShardJob]:
    """Every shard of the dataset, and the retries of what finished shards left out.

    Raises:
        CacheError: A store was written from other data or is damaged.
    """
    jobs = []
    finished = [(writer, StoreReader(writer.path).shards) for writer in writers.values()]
    for shard in dataset.shards:
        for writer, shards in finished:
            if shard.name in shards and shards[shard.name].source != shard.source:
                writer.is_committed(shard.name, source=shard.source)  # raises
        jobs.append(
            ShardJob(
                input_name=shard.name,
                name=shard.name,
                source=shard.source,
                keys={kind: frozenset() for kind in writers},
                is_retry=False,
            )
        )
    return [*jobs, *_retries(dataset, writers)] if retry_failed else jobs


def _retries(dataset: ClipDataset, writers: Mapping[Kind, StoreWriter]) -> Iterator[ShardJob]:
    """A retry per shard; stores that have seen as many retries of it share one."""
    sources = {shard.name: shard.source for shard in dataset.shards}
    keys: dict[tuple[str, int], dict[Kind, frozenset[str]]] = defaultdict(dict)
    for kind, writer in writers.items():
        for name, failed in _failed(dataset, writer).items():
            keys[name, _next_attempt(name, writer)][kind] = failed
    for (name, attempt), failed_by_kind in sorted(keys.items()):
        yield ShardJob(
            input_name=name,
            name=retry_shard_name(name, attempt),
            source=f"{sources[name]}, retry {attempt}",
            keys=failed_by_kind,
            is_retry=True,
        )


def _failed(dataset: ClipDataset, writer: StoreWriter) -> dict[str, frozenset[str]]:
    """The clips left out of a store, by the dataset's shard they are in; not those dropped."""
    by_store_shard: dict[str, set[str]] = defaultdict(set)
    for clip in StoreReader(writer.path).skipped:
        if clip.reason != DROPPED:
            by_store_shard[clip.shard].add(clip.key)
    by_input: dict[str, frozenset[str]] = {}
    for store_shard, keys in by_store_shard.items():
        name = input_shard_name(store_shard, dataset)
        if name is not None:
            by_input[name] = by_input.get(name, frozenset()) | keys
    return by_input


def _next_attempt(name: str, writer: StoreWriter) -> int:
    """The first retry of a shard that is not finished."""
    attempt = 1
    while writer.is_committed(retry_shard_name(name, attempt)):
        attempt += 1
    return attempt


def in_turn(jobs: Sequence[ShardJob], rank: int, world_size: int) -> list[ShardJob]:
    """The order in which a worker looks at the jobs: its own share, then the others'.

    Other workers go through their shares from the front, so it takes these from the back.
    """
    order = list(jobs[rank::world_size])
    for step in range(1, world_size):
        order += reversed(jobs[(rank + step) % world_size :: world_size])
    return order
