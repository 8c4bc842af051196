"""Stores of the tiny cache, joined as training joins them."""

from pathlib import Path

from stages.clips.config import ClipsConfig
from stages.train_student.data.stores import JoinedStores, join_buckets

CLIPS = ClipsConfig(path=Path("unused"), num_frames=9, height=32, width=48)


def join_stores(cache, chosen=None, *, kinds=("teacher",), **options) -> JoinedStores:
    """The stores of one clip size."""
    (stores,) = join_buckets(cache, [CLIPS], chosen or {}, kinds=kinds, **options).stores
    return stores
