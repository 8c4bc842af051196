"""Which store of a kind holds clips of a size; `stores` asks here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_schema import StoreNotFound, StoreReader, find_store, is_url, list_stores
from stages.clips.config import ClipsConfig


def find_stores(
    cache_root: Path | str, kind: str, folders: Sequence[str], *, size: ClipsConfig | None
) -> StoreReader:
    """The store of a kind, opened.

    Where several would do, the one whose clips are of that size is taken; text has none. A store
    that is the only one, or the only one named, is taken as it is: the checks say what is wrong
    with it.

    Args:
        cache_root: folder of the stores, or its URL.
        kind: of the store.
        folders: names of those to choose from; none takes all of the cache.
        size: of the clips.

    Raises:
        StoreNotFound: there is none, or not exactly one of that size.
        CacheError: a store is damaged or cannot be reached.
    """
    if len(folders) == 1:
        return StoreReader(_find(cache_root, kind, folders[0]), kind=kind)
    if folders:
        paths = [find_store(cache_root, kind, folder=name) for name in folders]
    else:
        paths = _of_kind(cache_root, kind)
        if len(paths) < 2 or size is None or kind == "text":
            return StoreReader(_find(cache_root, kind, None), kind=kind)
    if size is None:
        raise ValueError(f"train.stores.{kind} names several stores; a run of one size reads one")
    readers = [StoreReader(path, kind=kind) for path in paths]
    fitting = [reader for reader in readers if _is_of_size(reader, size)]
    # A store of SAM2's own grid serves all sizes of one shape; one made at this size comes first.
    exact = [reader for reader in fitting if _cut_to(reader, size) is not False]
    found = exact or fitting
    if len(found) == 1:
        return found[0]
    among = ", ".join(reader.name for reader in (found or readers))
    how_many = "several" if found else "none"
    raise StoreNotFound(
        f"{how_many} of the {kind} stores of {cache_root} hold clips of {size.size_name} (frames x "
        f"height x width): {among}; set train.stores.{kind} to the one to use, or, for several "
        "sizes, to a list with one of each; or run sam2vx-pipeline extract-features"
    )


def _is_of_size(reader: StoreReader, size: ClipsConfig) -> bool:
    """Whether a store's clips are of that size, or of its shape on SAM2's own grid."""
    cut = _cut_to(reader, size)
    if cut is None:
        return _shapes_fit(reader, size)
    if cut:
        return True
    if reader.settings.values.get("grid_source") != "native":
        return False
    origin = _origin(reader)
    same_shape = origin["height"] * size.width == origin["width"] * size.height
    # A Gram flow is on the student's grid, whatever its features were on.
    on_grid = reader.settings.kind != "gram_flow" or _shapes_fit(reader, size)
    return origin["num_frames"] == size.num_frames and same_shape and on_grid


def _cut_to(reader: StoreReader, size: ClipsConfig) -> bool | None:
    """Whether clips were cut to that size; None where the store does not say."""
    origin = _origin(reader)
    names = ("num_frames", "height", "width")
    if not set(names) <= origin.keys():
        return None
    cut = all(origin[name] == getattr(size, name) for name in names)
    return cut and (reader.settings.kind != "gram_flow" or _shapes_fit(reader, size))


def _origin(reader: StoreReader) -> dict[str, Any]:
    origin = reader.settings.values.get("clips")
    return origin if isinstance(origin, dict) else {}


def _shapes_fit(reader: StoreReader, size: ClipsConfig) -> bool:
    arrays = reader.settings.arrays
    maps = (size.num_frames, size.num_latent_frames)
    if "mean" in arrays:
        frames, _, *area = arrays["mean"].shape
        return frames == size.num_latent_frames and tuple(area) == size.latent_size
    if "features" in arrays:
        frames, *grid = arrays["features"].shape[:3]
        return frames in maps and tuple(grid) == size.token_grid
    if "gram_flow" in arrays:
        pairs, *grid = arrays["gram_flow"].shape[:3]
        return pairs + 1 in maps and tuple(grid) == size.token_grid
    if "forward" in arrays:
        return bool(arrays["forward"].shape[0] == size.num_frames)
    return True


def _of_kind(cache_root: Path | str, kind: str) -> list[Path | str]:
    try:
        stores = list_stores(cache_root)
    except StoreNotFound:  # a URL that cannot be listed; `find_store` says what to do
        return []
    return [path for path in stores if str(path).rsplit("/", 1)[-1].startswith(f"{kind}-")]


def _find(cache_root: Path | str, kind: str, folder: str | None) -> Path | str:
    try:
        return find_store(cache_root, kind, folder=folder)
    except StoreNotFound as error:
        listed = not is_url(cache_root) or bool(_of_kind(cache_root, "latents"))
        if folder is not None or not listed or _of_kind(cache_root, kind):
            raise
        if kind == "gram_flow":
            raise StoreNotFound(
                f"no gram_flow store in {cache_root}, which train.teacher_form=gram_flow reads; "
                "make one of the teacher store with sam2vx-pipeline cache derive gram-flow, or add "
                "gram_flow to extract.kinds and run sam2vx-pipeline extract-features"
            ) from error
        if kind == "masks":
            raise StoreNotFound(
                f"no masks store in {cache_root}, which train.objectives=[mask] and "
                "train.lgf.foreground_weight other than 1 read; add masks to extract.kinds and run "
                "sam2vx-pipeline extract-features"
            ) from error
        raise
