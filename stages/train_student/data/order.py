"""Order of samples over a run: stateless, so that a resumed run continues where it stopped.

Samples are numbered from 0 over the whole run, `batch_size` per step, whatever the number of
processes; the number determines a sample's clip, noise and timestep.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np


class SampleOrder:
    """Maps a sample's number to its bucket and clip.

    All samples of a step are from one bucket. Per epoch, bucket b gets
    max(1, round(n_b / batch_size)) steps, shuffled across buckets. Each bucket walks its own
    permutations of its clips, and each of its steps continues where the previous one stopped.
    """

    def __init__(self, num_clips: Sequence[int], *, batch_size: int, seed: int) -> None:
        """Compute the steps of each bucket per epoch.

        Args:
            num_clips: number of clips of every bucket.
            batch_size: samples per step over all ranks.
            seed: seed of the run.

        Raises:
            ValueError: a bucket has no clip.
        """
        if not num_clips or min(num_clips) < 1:
            raise ValueError(f"every bucket needs a clip to train on, got {list(num_clips)}")
        self._num_clips = tuple(num_clips)
        self._batch_size = batch_size
        self._seed = seed
        self.steps_per_epoch = tuple(
            max(1, (2 * clips + batch_size) // (2 * batch_size)) for clips in self._num_clips
        )
        """Steps per epoch of every bucket."""

    def locate(self, sample: int) -> tuple[int, int]:
        """Bucket of a sample, and its clip's index in that bucket."""
        step, position = divmod(sample, self._batch_size)
        bucket, step_of_bucket = self.step(step)
        number = step_of_bucket * self._batch_size + position
        stream = f"/bucket/{bucket}" if len(self._num_clips) > 1 else ""
        return bucket, clip_of_sample(number, self._num_clips[bucket], self._seed, stream)

    def step(self, step: int) -> tuple[int, int]:
        """Bucket of a step, and the number of earlier steps of that bucket."""
        steps = self.steps_per_epoch
        if len(steps) == 1:
            return 0, step
        epoch, position = divmod(step, sum(steps))
        buckets, before = _steps_of_epoch(steps, self._seed, epoch)
        bucket = int(buckets[position])
        return bucket, epoch * steps[bucket] + int(before[position])


def clip_of_sample(sample: int, num_clips: int, seed: int, stream: str = "") -> int:
    """Index of a sample's clip, from a new permutation of all clips in every epoch.

    Args:
        stream: name that makes the permutations independent of those of other streams.
    """
    epoch, position = divmod(sample, num_clips)
    return int(_permutations(num_clips, f"{seed}{stream}")(epoch)[position])


def seed_of_sample(sample: int, seed: int) -> int:
    """63-bit seed of a sample's random numbers."""
    return hash63(f"{seed}/sample/{sample}")


def micro_batches(
    steps: range, *, batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """Sample numbers of each forward pass of one rank, in order.

    Args:
        steps: the remaining steps.
        batch_size: samples per step over all ranks, a multiple of micro_batch_size * world_size.
    """
    for step in steps:
        for start in range(0, batch_size, micro_batch_size * world_size):
            first = step * batch_size + start + rank * micro_batch_size
            yield list(range(first, first + micro_batch_size))


def largest_micro_batch(batch_size: int, limit: int, world_size: int) -> int:
    """Clips per forward pass and rank: the largest divisor of the rank's clips up to `limit`.

    Raises:
        ValueError: the batch cannot be divided evenly among the ranks.
    """
    if batch_size % world_size:
        raise ValueError(
            f"train.batch_size must be a multiple of the number of processes, {world_size}, got "
            f"{batch_size}; {max(batch_size // world_size, 1) * world_size} works"
        )
    per_rank = batch_size // world_size
    return max(clips for clips in range(1, min(limit, per_rank) + 1) if per_rank % clips == 0)


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes per rank and step, for a micro-batch size from `largest_micro_batch`."""
    passes, rest = divmod(batch_size, micro_batch_size * world_size)
    assert rest == 0, "the micro-batch size does not divide the rank's clips"
    return passes


@lru_cache(maxsize=64)
def _permutations(num_clips: int, name: str) -> Callable[[int], np.ndarray]:
    """Permutation of one bucket's clips by epoch; 8 MB each for a million clips."""

    @lru_cache(maxsize=2)  # a batch may span two epochs
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng(hash63(f"{name}/epoch/{epoch}")).permutation(num_clips)

    return permutation


@lru_cache(maxsize=2)
def _steps_of_epoch(steps: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Bucket of each step of an epoch, and the number of its earlier steps in the epoch."""
    buckets = np.repeat(np.arange(len(steps)), steps)
    np.random.default_rng(hash63(f"{seed}/buckets/epoch/{epoch}")).shuffle(buckets)
    before = np.empty_like(buckets)
    for bucket, count in enumerate(steps):
        before[buckets == bucket] = np.arange(count)
    return buckets, before


def hash63(name: str) -> int:
    """63-bit hash of a name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
