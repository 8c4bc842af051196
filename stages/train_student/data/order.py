"""Which clip is seen when: stateless, so that a resumed run goes on where it was.

Samples are numbered from 0 over the whole run, `batch_size` per step, however many processes share
them; each number decides its clip, noise and timestep. The dataset and its loader use this.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np


class SampleOrder:
    """Which bucket and which of its clips each sample shows.

    All samples of a step are of one bucket. In an epoch each bucket has as many steps as its clips
    fill, rounded, at least one; they follow one another in an order of the epoch's own. Each
    bucket goes through its clips at its own pace, in permutations that its steps go on with where
    the one before it stopped.
    """

    def __init__(self, num_clips: Sequence[int], *, batch_size: int, seed: int) -> None:
        """Order the clips.

        Args:
            num_clips: of every bucket.
            batch_size: samples per step over all ranks.
            seed: of the run.

        Raises:
            ValueError: a bucket has no clip.
        """
        if not num_clips or min(num_clips) < 1:
            raise ValueError(f"every bucket needs a clip to train on, got {list(num_clips)}")
        self._num_clips = tuple(num_clips)
        self._batch_size = batch_size
        self._seed = seed
        self._steps = tuple(
            max(1, (2 * clips + batch_size) // (2 * batch_size)) for clips in self._num_clips
        )

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Of every bucket."""
        return self._steps

    def place(self, sample: int) -> tuple[int, int]:
        """Bucket of a sample, and the index of its clip in that bucket."""
        step, position = divmod(sample, self._batch_size)
        bucket, step_of_bucket = self.step(step)
        number = step_of_bucket * self._batch_size + position
        stream = f"/bucket/{bucket}" if len(self._num_clips) > 1 else ""
        return bucket, clip_of_sample(number, self._num_clips[bucket], self._seed, stream)

    def step(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps that bucket had before it."""
        if len(self._steps) == 1:
            return 0, step
        epoch, position = divmod(step, sum(self._steps))
        buckets, before = _steps_of_epoch(self._steps, self._seed, epoch)
        bucket = int(buckets[position])
        return bucket, epoch * self._steps[bucket] + int(before[position])


def clip_of_sample(sample: int, num_clips: int, seed: int, stream: str = "") -> int:
    """Index of the clip that sample shows: every epoch a fresh permutation of all clips.

    Args:
        stream: sets the permutations apart from those of others.
    """
    epoch, position = divmod(sample, num_clips)
    return int(_permutations(num_clips, f"{seed}{stream}").of_epoch(epoch)[position])


def seed_of_sample(sample: int, seed: int) -> int:
    """Seed of everything random about a sample, in 63 bits."""
    return hashed(f"{seed}/sample/{sample}")


def micro_batches(
    steps: range, *, batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """The sample numbers of each forward pass of one rank, in order.

    Args:
        steps: the steps still to make.
        batch_size: samples per step over all ranks, a multiple of micro_batch_size * world_size.
    """
    for step in steps:
        for start in range(0, batch_size, micro_batch_size * world_size):
            first = step * batch_size + start + rank * micro_batch_size
            yield list(range(first, first + micro_batch_size))


def largest_micro_batch(batch_size: int, most: int, world_size: int) -> int:
    """Clips per forward pass and rank: as many as go evenly into each rank's share, up to `most`.

    Raises:
        ValueError: the batch cannot be shared evenly among the ranks.
    """
    if batch_size % world_size:
        raise ValueError(
            f"train.batch_size must be a multiple of the number of processes, {world_size}, got "
            f"{batch_size}; {max(batch_size // world_size, 1) * world_size} would do"
        )
    share = batch_size // world_size
    return max(clips for clips in range(1, min(most, share) + 1) if share % clips == 0)


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes per rank and step, for a micro-batch that `largest_micro_batch` gave."""
    passes, rest = divmod(batch_size, micro_batch_size * world_size)
    assert rest == 0, "the micro-batch goes evenly into every rank's share"
    return passes


class _Permutations:
    """The orders of one bucket's clips, epoch by epoch; a million of them take 8 MB each."""

    def __init__(self, num_clips: int, name: str) -> None:
        self._num_clips = num_clips
        self._name = name
        self._kept: dict[int, np.ndarray] = {}

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Made when it is first needed; only two are kept, as a batch may lie across them."""
        if epoch not in self._kept:
            name = f"{self._name}/epoch/{epoch}"
            while len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            self._kept[epoch] = np.random.default_rng(hashed(name)).permutation(self._num_clips)
        return self._kept[epoch]


@lru_cache(maxsize=64)
def _permutations(num_clips: int, name: str) -> _Permutations:
    return _Permutations(num_clips, name)


@lru_cache(maxsize=2)
def _steps_of_epoch(steps: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each step of an epoch, and how many of the same came before it in the epoch."""
    buckets = np.repeat(np.arange(len(steps)), steps)
    np.random.default_rng(hashed(f"{seed}/buckets/epoch/{epoch}")).shuffle(buckets)
    before = np.empty_like(buckets)
    for bucket, count in enumerate(steps):
        before[buckets == bucket] = np.arange(count)
    return buckets, before


def hashed(name: str) -> int:
    """63 bits that follow from the name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
