"""Stores of one clip size: finding and opening them, and checking that they have the same sources.

The entries of a clip must come from the same video and prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import SortedText, StoreNotFound, StoreReader, find_store, is_url, list_stores
from cache_schema.shown_text import first_few
from stages.clips.config import ClipsConfig
from stages.clips.fingerprints import source_hashes, video_hashes
from stages.students.student import StudentConfigs
from stages.train_student.config import KIND_OF_FORM

_ANY_SIZE = ClipsConfig(path=Path())
_KINDS = ("text", "latents", *KIND_OF_FORM.values(), "masks", "visual")


def open_stores(
    cache_root: Path | str,
    chosen: Mapping[str, Sequence[str]],
    *,
    kinds: Sequence[str],
    size: ClipsConfig,
    student: StudentConfigs | None = None,
) -> dict[str, StoreReader]:
    """Open the store of every kind.

    Args:
        cache_root: folder of the stores, or its URL.
        chosen: folder names per kind.
        kinds: kinds besides text and latents.
        size: size of the clips.
        student: the base model; of several text or latents stores, those of other models are
            passed over.

    Raises:
        ValueError: `chosen` names an unknown kind.
        CacheError: a store is missing, ambiguous or damaged.
    """
    unknown = sorted(set(chosen) - set(_KINDS))
    if unknown:
        raise ValueError(f"train.stores names {unknown[0]!r}; kinds are {', '.join(_KINDS)}")
    return {
        kind: open_store(
            cache_root, kind, _folders(cache_root, kind, chosen.get(kind, ()), student), size=size
        )
        for kind in ("text", "latents", *kinds)
    }


def base_settings(reader: StoreReader) -> dict[str, Any]:
    """Settings of the model that a text or latents store was made with; empty if not recorded."""
    found = reader.settings.values.get("base")
    return found if isinstance(found, dict) else {}


def _folders(
    cache_root: Path | str, kind: str, chosen: Sequence[str], student: StudentConfigs | None
) -> Sequence[str]:
    """The folders to choose from: those of the base model, if the cache has several models'."""
    if student is None or chosen or kind not in ("text", "latents"):
        return chosen
    paths = _stores_of_kind(cache_root, kind)
    if len(paths) < 2:
        return chosen
    readers = [StoreReader(path, kind=kind) for path in paths]
    return [reader.name for reader in readers if _is_of(reader, student)]


def _is_of(reader: StoreReader, student: StudentConfigs) -> bool:
    """Whether a text or latents store was made with a model such as this one."""
    base, arrays = base_settings(reader), reader.settings.arrays
    if reader.settings.kind == "latents":
        has_image = arrays.keys() >= student.first_frame_arrays(_ANY_SIZE, draws=1).keys()
        return student.check_latents(base) is None and has_image
    shape = arrays["embeds"].shape if "embeds" in arrays else None
    return student.check_text(base) is None and shape == student.text_shape


def open_store(
    cache_root: Path | str, kind: str, folders: Sequence[str], *, size: ClipsConfig
) -> StoreReader:
    """Find and open the store of a kind.

    If several stores match, pick the one with this clip size (text stores have no size). A single
    match is returned unchecked; checks.py reports mismatches.

    Args:
        cache_root: folder of the stores, or its URL.
        kind: kind of the store.
        folders: folder names to choose from; empty means all stores of the cache.
        size: size of the clips.

    Raises:
        StoreNotFound: there is none, or not exactly one of that size.
        CacheError: a store is damaged or cannot be reached.
    """
    if len(folders) == 1:
        return StoreReader(_find_with_hints(cache_root, kind, folders[0]), kind=kind)
    if folders:
        paths = [find_store(cache_root, kind, folder=name) for name in folders]
    else:
        paths = _stores_of_kind(cache_root, kind)
        if len(paths) < 2 or kind == "text":
            return StoreReader(_find_with_hints(cache_root, kind, None), kind=kind)
    readers = [StoreReader(path, kind=kind) for path in paths]
    fitting = [reader for reader in readers if _fits_size(reader, size)]
    # Stores on SAM2's own grid fit all sizes of one aspect ratio; prefer one made at this size.
    exact = [reader for reader in fitting if _has_size(reader, size) is not False]
    found = exact or fitting
    if len(found) == 1:
        return found[0]
    names = ", ".join(reader.name for reader in (found or readers))
    how_many = "several" if found else "none"
    raise StoreNotFound(
        f"{how_many} of the {kind} stores of {cache_root} hold clips of {size.size_name} (frames x "
        f"height x width): {names}; set train.stores.{kind} to the one to use or, for several "
        "sizes, to a list with one per size; or run sam2vx-pipeline extract-features"
    )


def _fits_size(reader: StoreReader, size: ClipsConfig) -> bool:
    """Whether a store's clips have this size, or its aspect ratio on SAM2's own grid."""
    same_size = _has_size(reader, size)
    if same_size is None:
        return _shapes_match(reader, size)
    if same_size:
        return True
    if reader.settings.values.get("grid_source") != "native":
        return False
    origin = _origin(reader)
    same_shape = origin["height"] * size.width == origin["width"] * size.height
    # A Gram flow is on the student's grid, whatever grid its features had.
    on_grid = reader.settings.kind != "gram_flow" or _shapes_match(reader, size)
    return origin["num_frames"] == size.num_frames and same_shape and on_grid


def _has_size(reader: StoreReader, size: ClipsConfig) -> bool | None:
    """Whether clips were cropped to this size; None if the store does not record it."""
    origin = _origin(reader)
    names = ("num_frames", "height", "width")
    if not set(names) <= origin.keys():
        return None
    same_size = all(origin[name] == getattr(size, name) for name in names)
    return same_size and (reader.settings.kind != "gram_flow" or _shapes_match(reader, size))


def _origin(reader: StoreReader) -> dict[str, Any]:
    origin = reader.settings.values.get("clips")
    return origin if isinstance(origin, dict) else {}


def _shapes_match(reader: StoreReader, size: ClipsConfig) -> bool:
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


def _stores_of_kind(cache_root: Path | str, kind: str) -> list[Path | str]:
    try:
        stores = list_stores(cache_root)
    except StoreNotFound:  # a URL that cannot be listed; `find_store` explains what to do
        return []
    return [path for path in stores if str(path).rsplit("/", 1)[-1].startswith(f"{kind}-")]


def _find_with_hints(cache_root: Path | str, kind: str, folder: str | None) -> Path | str:
    try:
        return find_store(cache_root, kind, folder=folder)
    except StoreNotFound as error:
        listed = not is_url(cache_root) or bool(_stores_of_kind(cache_root, "latents"))
        if folder is not None or not listed or _stores_of_kind(cache_root, kind):
            raise
        if kind == "gram_flow":
            raise StoreNotFound(
                f"no gram_flow store in {cache_root}, which train.teacher_form=gram_flow reads; "
                "derive one from the teacher store with sam2vx-pipeline cache derive gram-flow, or "
                "add gram_flow to extract.kinds and run sam2vx-pipeline extract-features"
            ) from error
        if kind == "masks":
            raise StoreNotFound(
                f"no masks store in {cache_root}, which train.objectives=[mask] and "
                "train.lgf.foreground_weight other than 1 read; add masks to extract.kinds and run "
                "sam2vx-pipeline extract-features"
            ) from error
        if kind == "visual":
            raise StoreNotFound(
                f"no visual store in {cache_root}, which losses with teacher=visual read; add "
                "visual to extract.kinds, choose its encoder with extract.visual.checkpoint, and "
                "run sam2vx-pipeline extract-features"
            ) from error
        raise


_MAX_KEYS_SHOWN = 5
"""Keys listed in a message."""

_PROMPT_SETTINGS = ("prompts", "backward_prompt")
"""Settings that determine which prompt data enter a fingerprint."""


def check_same_sources(readers: Mapping[str, StoreReader], keys: SortedText) -> None:
    """Reject stores whose entries of a clip were made from different sources.

    Compares the fingerprints in the stores' indexes; reads no clips or records.

    Args:
        readers: store readers by kind, including latents.
        keys: clips that all of them hold.

    Raises:
        ValueError: a clip's entries were made from different videos; or teacher and masks with the
            same prompt settings from different prompts.
    """
    fingerprints = {
        kind: reader.fingerprints[reader.keys.rows_of(keys)] for kind, reader in readers.items()
    }
    for kind in readers:
        _compare("latents", kind, readers, fingerprints, keys, video_hashes, "videos")
    for kind in ("teacher", "gram_flow"):
        if kind in readers and "masks" in readers:
            teacher, masks = readers[kind], readers["masks"]
            if not other_prompt_settings(teacher, masks) and _know_their_prompts(teacher, masks):
                _compare("masks", kind, readers, fingerprints, keys, source_hashes, "prompts")


def other_prompt_settings(teacher: StoreReader, masks: StoreReader) -> list[str]:
    """Names of the prompt settings in which the stores differ; their subjects may differ too."""
    values = [reader.settings.values for reader in (teacher, masks)]
    return [
        name
        for name in _PROMPT_SETTINGS
        if all(name in one for one in values) and values[0][name] != values[1][name]
    ]


def _know_their_prompts(*readers: StoreReader) -> bool:
    return all(name in one.settings.values for one in readers for name in _PROMPT_SETTINGS)


def _compare(
    kind: str,
    other: str,
    readers: Mapping[str, StoreReader],
    fingerprints: Mapping[str, np.ndarray],
    keys: SortedText,
    half: Callable[[np.ndarray], np.ndarray],
    what: str,
) -> None:
    rows = np.flatnonzero(half(fingerprints[kind]) != half(fingerprints[other]))
    if not len(rows):
        return
    listed = first_few([repr(keys[int(row)]) for row in rows], _MAX_KEYS_SHOWN)
    raise ValueError(
        f"{readers[kind].path} and {readers[other].path} were made from different {what} of "
        f"{len(rows)} of {len(keys)} clips: {listed}. Run sam2vx-pipeline extract-features "
        f"--kinds {','.join(readers)} on the intended dataset; it reports which clips to extract "
        "again with --refresh-changed. Or exclude the clips with train.leave_out"
    )
