"""The stores of a cache, grouped by clip size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_schema import StoreNotFound, StoreReader, is_url, list_stores
from cache_schema.names import STORE_FILE

KINDS = ("masks", "teacher", "gram_flow", "visual", "latents", "text")
"""Kinds of stores; the first that a cache holds is the one whose clips are listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeStores:
    """Stores of clips of one size, at most one of each kind, and the text store."""

    size: str | None
    """Frames x height x width; None if the stores record none."""
    readers: Mapping[str, StoreReader]
    """By kind."""

    @property
    def listed(self) -> StoreReader:
        """The store whose clips are listed."""
        return next(self.readers[kind] for kind in KINDS if kind in self.readers)


def open_cache(
    cache: Path | str, chosen: Mapping[str, Sequence[str]] | None = None
) -> tuple[SizeStores, ...]:
    """Open the stores of a cache.

    Args:
        cache: A folder of stores or one store, or the URL of either.
        chosen: Folder names to choose from, by kind, as in `train.stores`.

    Raises:
        StoreNotFound: There is no store, or two of one kind and size.
        CacheError: A store is damaged or cannot be reached.
    """
    readers = [StoreReader(path) for path in _paths(cache)]
    sizes: dict[str | None, dict[str, StoreReader]] = {}
    text: dict[str, StoreReader] = {}
    for reader in readers:
        kind = reader.settings.kind
        folders = (chosen or {}).get(kind, ())
        if folders and reader.name not in folders:
            continue
        of_size = text if kind == "text" else sizes.setdefault(_size_of(reader), {})
        if kind in of_size:
            raise StoreNotFound(
                f"several {kind} stores of the same clip size in {cache}: "
                f"{of_size[kind].name}, {reader.name}",
                remedy="choose",
                subject=kind,
            )
        of_size[kind] = reader
    if not sizes and text:
        sizes[None] = {}
    if not sizes:
        raise StoreNotFound(f"no store in {cache}", remedy="make")
    return tuple(
        SizeStores(size=size, readers=of_size | text)
        for size, of_size in sorted(sizes.items(), key=lambda item: item[0] or "")
    )


def _paths(cache: Path | str) -> list[Path | str]:
    if is_url(cache):
        stores = list_stores(cache)
        return stores or [cache]
    return [Path(cache)] if (Path(cache) / STORE_FILE).is_file() else list_stores(cache)


def _size_of(reader: StoreReader) -> str | None:
    recorded = reader.settings.values.get("clips")
    if not isinstance(recorded, dict):
        return None
    parts = [recorded.get(name) for name in ("num_frames", "height", "width")]
    return None if None in parts else "x".join(map(str, parts))
