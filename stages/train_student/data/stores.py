"""The cache as training reads it at one size: one store of each kind, joined by clip key.

Joined clips must come from the same video and prompt.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import SortedText, StoreNotFound, StoreReader, find_store, is_url, list_stores
from stages.clips.config import ClipsConfig
from stages.clips.fingerprints import sources_half, video_half
from stages.teacher_store.settings import native_parts
from stages.train_student.config import KIND_OF_FORM, TeacherForm
from stages.train_student.data.splits import LeftOut, choose_held_out, count_reasons, read_keys


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


_NAMED = 5
"""Keys that a message names."""

_PROMPTED_BY = ("prompts", "backward_prompt")
"""Settings that say what of a clip's prompt goes into a fingerprint."""


def refuse_other_sources(readers: Mapping[str, StoreReader], keys: SortedText) -> None:
    """Refuse stores whose entries of a clip must not be trained on together.

    Compares fingerprints in the stores' indexes; no clip and no record is read.

    Args:
        readers: By kind; latents among them.
        keys: Clips that all of them hold.

    Raises:
        ValueError: A clip's entries were made from different videos; or teacher and masks, where
            they are prompted alike, from different prompts.
    """
    fingerprints = {
        kind: reader.fingerprints[reader.keys.rows_of(keys)] for kind, reader in readers.items()
    }
    for kind in readers:
        _compare("latents", kind, readers, fingerprints, keys, video_half, "videos")
    for kind in ("teacher", "gram_flow"):
        if kind in readers and "masks" in readers and _prompted_alike(readers, kind):
            _compare("masks", kind, readers, fingerprints, keys, sources_half, "prompts")


def _prompted_alike(readers: Mapping[str, StoreReader], kind: str) -> bool:
    teacher, masks = readers[kind].settings.values, readers["masks"].settings.values
    return all(
        name in teacher and name in masks and teacher[name] == masks[name] for name in _PROMPTED_BY
    )


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
    named = ", ".join(repr(keys[int(row)]) for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    raise ValueError(
        f"{readers[kind].path} and {readers[other].path} were made from different {what} of "
        f"{len(rows)} of {len(keys)} clips: {named}{more}. Run sam2vx-pipeline extract-features "
        f"--kinds {','.join(readers)} on the dataset that is meant; it says which clips to make "
        "again with --refresh-changed. Or leave the clips out with train.leave_out"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedStores:
    """Readers of one store per kind, the keys to train on, sorted, and those held out."""

    text: StoreReader
    latents: StoreReader
    teacher: StoreReader | None
    """The teacher store, or the gram_flow store; None where no auxiliary loss reads one."""
    masks: StoreReader | None
    """The tracked subject's masks; None where no auxiliary loss reads them."""
    keys: SortedText
    """Those that all stores hold, without those left out by name and those held out."""
    held_out: tuple[str, ...]
    """Clips for validation, in the order in which they were chosen."""
    left_out: LeftOut

    @property
    def readers(self) -> dict[str, StoreReader]:
        """The stores that are read, by kind."""
        readers = (self.text, self.latents, self.teacher, self.masks)
        return {reader.settings.kind: reader for reader in readers if reader is not None}

    @property
    def num_frames(self) -> int:
        """Of the clips, as the latents' shape says."""
        return 4 * (array_shape(self.latents, "mean")[0] - 1) + 1

    @property
    def size(self) -> str:
        """Frames, height and width of the clips as the latents' shape says: `49x480x720`."""
        _, _, height, width = array_shape(self.latents, "mean")
        return f"{self.num_frames}x{8 * height}x{8 * width}"

    @property
    def teacher_form(self) -> TeacherForm | None:
        """What is stored of the teacher, or None without one."""
        if self.teacher is None:
            return None
        return "gram_flow" if self.teacher.settings.kind == "gram_flow" else "features"

    @property
    def teacher_maps(self) -> int | None:
        """Maps per clip in the teacher's store, or None without a teacher."""
        if self.teacher is None:
            return None
        if self.teacher_form == "gram_flow":
            return array_shape(self.teacher, "gram_flow")[0] + 1
        return array_shape(self.teacher, "features")[0]

    @property
    def native_parts(self) -> int | None:
        """Into how many parts the teacher's channels fall, if they must be brought to the grid.

        None without a teacher, and for one that is on the student's grid already.
        """
        if self.teacher is None or self.teacher_form != "features":
            return None
        return native_parts(self.teacher.settings)


_KINDS = ("text", "latents", *KIND_OF_FORM.values(), "masks")


def join_stores(
    cache_root: Path | str,
    chosen: Mapping[str, Sequence[str]],
    *,
    kinds: Sequence[str],
    size: ClipsConfig | None = None,
    leave_out: Path | None = None,
    held_out: int = 0,
) -> JoinedStores:
    """Open the stores of one size and join them by key.

    Args:
        cache_root: folder of the stores, or its URL.
        chosen: folder names per kind, needed where the cache holds several that would do.
        kinds: what is read beside text and latents: teacher or gram_flow, and masks.
        size: of the clips; where the cache holds stores of several sizes it decides among them.
        leave_out: manifest of clips to leave out (`left_out.read_keys`).
        held_out: how many clips to keep for validation.

    Raises:
        ValueError: `chosen` names an unknown kind, the manifest is malformed, no clip is left, or
            the entries of a clip were made from different sources.
        CacheError: a store is missing, ambiguous or damaged.
    """
    named = frozenset() if leave_out is None else read_keys(leave_out)
    readers = open_stores(cache_root, chosen, kinds=kinds, size=size)
    common = common_keys(readers)
    if not common:
        raise ValueError(no_common_clip(cache_root, readers))
    remaining = common.take(rows_without(common, named))
    held = choose_held_out((remaining,), held_out)
    return joined(readers, common, leave_out=leave_out, named=named, held_out=held)


def open_stores(
    cache_root: Path | str,
    chosen: Mapping[str, Sequence[str]],
    *,
    kinds: Sequence[str],
    size: ClipsConfig | None,
) -> dict[str, StoreReader]:
    """A reader of every kind that is needed.

    Raises:
        As `join_stores`.
    """
    unknown = sorted(set(chosen) - set(_KINDS))
    if unknown:
        raise ValueError(f"train.stores names {unknown[0]!r}; kinds are {', '.join(_KINDS)}")
    return {
        kind: find_stores(cache_root, kind, chosen.get(kind, ()), size=size)
        for kind in ("text", "latents", *kinds)
    }


def common_keys(readers: Mapping[str, StoreReader]) -> SortedText:
    """The clips that are in every store."""
    first, *others = (reader.keys for reader in readers.values())
    return first.in_all(*others)


def no_common_clip(cache_root: Path | str, readers: Mapping[str, StoreReader]) -> str:
    """What to say when `common_keys` are none."""
    counts = ", ".join(f"{kind} {len(reader)}" for kind, reader in readers.items())
    return (
        f"no clip is in every store of {cache_root} ({counts}); extract all kinds from the "
        "same clips with sam2vx-pipeline extract-features"
    )


def joined(
    readers: Mapping[str, StoreReader],
    common: SortedText,
    *,
    leave_out: Path | None,
    named: Iterable[str],
    held_out: Sequence[str],
) -> JoinedStores:
    """The stores, and of the keys in common those to train on.

    Args:
        leave_out: manifest that names clips to leave out.
        named: the clips it names.
        held_out: clips to keep for validation; those that are not here are no concern of it.

    Raises:
        ValueError: nothing is left to train on, or a clip's entries do not belong together.
    """
    remaining = common.take(rows_without(common, named))
    if not remaining:
        raise ValueError(
            f"train.leave_out {leave_out} names every one of the {len(common)} clips that are in "
            "every store; nothing is left to train on"
        )
    refuse_other_sources(readers, remaining)
    keys = remaining.take(rows_without(remaining, held_out))
    if not keys:
        raise ValueError(
            f"train.validation.clips holds out every one of the {len(remaining)} clips of "
            f"{readers['latents'].path}; nothing is left to train on there: hold out fewer; 32 of "
            "thousands is usual"
        )
    teachers = [readers[kind] for kind in KIND_OF_FORM.values() if kind in readers]
    return JoinedStores(
        text=readers["text"],
        latents=readers["latents"],
        teacher=teachers[0] if teachers else None,
        masks=readers.get("masks"),
        keys=keys,
        held_out=tuple(key for key in held_out if key in remaining),
        left_out=LeftOut(
            not_in_every_store={
                kind: len(reader) - len(common) for kind, reader in readers.items()
            },
            skipped={kind: count_reasons(reader.skipped) for kind, reader in readers.items()},
            manifest=None if leave_out is None else str(leave_out),
            named=len(common) - len(remaining),
        ),
    )


def rows_without(keys: SortedText, named: Iterable[str]) -> np.ndarray:
    """Rows of the keys that are not named."""
    rows = [row for key in named if (row := keys.find(key)) is not None]
    return np.delete(np.arange(len(keys)), rows)


def array_shape(reader: StoreReader, name: str) -> tuple[int, ...]:
    """Shape of one clip's array.

    Raises:
        ValueError: the store has no such array.
    """
    if name not in reader.settings.arrays:
        raise ValueError(
            f"{reader.path} has no array {name!r}, which training needs; it has "
            f"{', '.join(reader.settings.arrays)}"
        )
    return reader.settings.arrays[name].shape
