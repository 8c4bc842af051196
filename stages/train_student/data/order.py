"""Which clip is seen when: stateless, so that a resumed run goes on where it was.

Samples are numbered from 0 over the whole run, `batch_size` per step, however many processes share
them; each number decides its clip, noise and timestep. The dataset and its loader use this.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np


def clip_of_sample(sample: int, num_clips: int, seed: int) -> int:
    """Index of the clip that sample shows: every epoch a fresh permutation of all clips."""
    epoch, position = divmod(sample, num_clips)
    return int(_permutation(num_clips, seed, epoch)[position])


def seed_of_sample(sample: int, seed: int) -> int:
    """Seed of everything random about a sample, in 63 bits."""
    return _hashed(f"{seed}/sample/{sample}")


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


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes per rank and step.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    together = micro_batch_size * world_size
    if batch_size % together:
        raise ValueError(
            f"train.batch_size must be a multiple of train.micro_batch_size x processes, "
            f"{micro_batch_size} x {world_size} = {together}, got {batch_size}; "
            f"{max(batch_size // together, 1) * together} would do"
        )
    return batch_size // together


@lru_cache(maxsize=2)
def _permutation(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(_hashed(f"{seed}/epoch/{epoch}")).permutation(num_clips)


def _hashed(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
