"""Which clips are kept for validation, and what is random about them; stores and dataset ask here.

A clip's rank is a hash of its key alone. So the clips held out are the same whatever the seed and
the order of the clips, and more clips in the cache change the choice only where they rank higher.
"""

import heapq
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def choose_held_out(keys: Sequence[Iterable[str]], count: int) -> tuple[str, ...]:
    """The `count` keys of the lowest ranks, the lowest first; all keys if there are fewer.

    Args:
        keys: those of every bucket; a key that is in several counts once.
    """
    if count == 0:
        return ()
    ranked: set[tuple[bytes, str]] = set()
    for of_bucket in keys:
        ranked.update(heapq.nsmallest(count, ((_rank(key), key) for key in of_bucket)))
    return tuple(key for _, key in heapq.nsmallest(count, ranked))


def seed_of_held_out(key: str, timestep: int) -> int:
    """Seed of everything random about a held-out clip at a timestep, in 63 bits."""
    digest = blake2b(f"{timestep}/{key}".encode(), digest_size=8, person=b"validation")
    return int.from_bytes(digest.digest(), "little") >> 1


def _rank(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=8, person=b"held out").digest()
