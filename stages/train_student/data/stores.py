"""The cache as training reads it: one store of each kind, joined by clip key.

`store_checks` tells whether they fit; the dataset reads through `JoinedStores`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_schema import StoreNotFound, StoreReader, find_store, list_stores
from cache_schema.packed_text import SortedText
from stages.teacher_forms.settings import native_parts
from stages.train_student.config import KIND_OF_FORM, TeacherForm
from stages.train_student.data.left_out import LeftOut, count_reasons, read_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedStores:
    """Readers of one store per kind and the keys to train on, sorted."""

    text: StoreReader
    latents: StoreReader
    teacher: StoreReader | None
    """The teacher store, or the gram_flow store; None for plain fine-tuning."""
    keys: SortedText
    """Those that all stores hold, without those left out by name."""
    left_out: LeftOut

    @property
    def readers(self) -> dict[str, StoreReader]:
        """The stores that are read, by kind."""
        readers = [self.text, self.latents, *([] if self.teacher is None else [self.teacher])]
        return {reader.settings.kind: reader for reader in readers}

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


_KINDS = ("text", "latents", *KIND_OF_FORM.values())


def join_stores(
    cache_root: Path | str,
    chosen: Mapping[str, str],
    *,
    teacher_form: TeacherForm | None,
    leave_out: Path | None = None,
) -> JoinedStores:
    """Open the stores and join them by key.

    Args:
        cache_root: folder of the stores, or its URL.
        chosen: folder name per kind, needed where the cache holds several of that kind.
        teacher_form: which store of the teacher is read; None reads none.
        leave_out: manifest of clips to leave out (`left_out.read_keys`).

    Raises:
        ValueError: `chosen` names an unknown kind, the manifest is malformed, or no clip is left.
        CacheError: a store is missing, ambiguous or damaged.
    """
    named = frozenset() if leave_out is None else read_keys(leave_out)
    unknown = sorted(set(chosen) - set(_KINDS))
    if unknown:
        raise ValueError(f"train.stores names {unknown[0]!r}; kinds are {', '.join(_KINDS)}")
    kinds = ["text", "latents", *([] if teacher_form is None else [KIND_OF_FORM[teacher_form]])]
    readers = {
        kind: StoreReader(_find(cache_root, kind, chosen.get(kind)), kind=kind) for kind in kinds
    }
    first, *others = (reader.keys for reader in readers.values())
    common = first.in_all(*others)
    if not common:
        counts = ", ".join(f"{kind} {len(reader)}" for kind, reader in readers.items())
        raise ValueError(
            f"no clip is in every store of {cache_root} ({counts}); extract all kinds from the "
            "same clips with sam2vx-pipeline extract-features"
        )
    keys = _without(common, named)
    if not keys:
        raise ValueError(
            f"train.leave_out {leave_out} names every one of the {len(common)} clips that are in "
            f"every store of {cache_root}; nothing is left to train on"
        )
    return JoinedStores(
        text=readers["text"],
        latents=readers["latents"],
        teacher=readers[kinds[2]] if teacher_form is not None else None,
        keys=keys,
        left_out=LeftOut(
            not_in_every_store={
                kind: len(reader) - len(common) for kind, reader in readers.items()
            },
            skipped={kind: count_reasons(reader.skipped) for kind, reader in readers.items()},
            manifest=None if leave_out is None else str(leave_out),
            named=len(common) - len(keys),
        ),
    )


def _without(keys: SortedText, named: Iterable[str]) -> SortedText:
    rows = [row for key in named if (row := keys.find(key)) is not None]
    return keys.take(np.delete(np.arange(len(keys)), rows)) if rows else keys


def _find(cache_root: Path | str, kind: str, folder: str | None) -> Path | str:
    try:
        return find_store(cache_root, kind, folder=folder)
    except StoreNotFound as error:
        if kind != "gram_flow" or folder is not None or _some_store_of(kind, cache_root):
            raise
        raise StoreNotFound(
            f"no gram_flow store in {cache_root}, which train.teacher_form=gram_flow reads; make "
            "one of the teacher store with sam2vx-pipeline cache derive gram-flow, or add "
            "gram_flow to extract.kinds and run sam2vx-pipeline extract-features"
        ) from error


def _some_store_of(kind: str, cache_root: Path | str) -> bool:
    try:
        stores = list_stores(cache_root)
    except StoreNotFound:  # a URL that cannot be listed; the first error says what to do
        return True
    return any(str(path).rsplit("/", 1)[-1].startswith(f"{kind}-") for path in stores)


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
