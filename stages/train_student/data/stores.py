"""The cache as training reads it at one size: one store of each kind, joined by clip key.

`store_checks` tells whether they fit, `buckets` joins one of these for every size of a run; the
dataset reads through `JoinedStores`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_schema import StoreReader
from cache_schema.packed_text import SortedText
from stages.clips.config import ClipsConfig
from stages.teacher_forms.settings import native_parts
from stages.train_student.config import KIND_OF_FORM, TeacherForm
from stages.train_student.data.finding import find_stores
from stages.train_student.data.held_out import choose_held_out
from stages.train_student.data.left_out import LeftOut, count_reasons, read_keys
from stages.train_student.data.same_sources import refuse_other_sources


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
