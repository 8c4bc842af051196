"""The stores of every size of a run, with the clips to hold out chosen among all of them.

`train` calls this; one size is the usual case of several.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema import StoreReader
from stages.clips.config import ClipsConfig
from stages.train_student.config import TeacherForm
from stages.train_student.data.splits import LeftOut, choose_held_out, read_keys
from stages.train_student.data.stores import (
    JoinedStores,
    array_shape,
    common_keys,
    joined,
    no_common_clip,
    open_stores,
    rows_without,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """The clips of a run, by size."""

    stores: tuple[JoinedStores, ...]
    """Of each size, at least one."""
    held_out: tuple[str, ...]
    """Keys of the clips for validation, in the order in which they were chosen."""
    left_out: LeftOut
    """Of all sizes together."""

    @property
    def clips(self) -> dict[str, int]:
        """How many clips of each size there are to train on."""
        return {stores.size: len(stores.keys) for stores in self.stores}

    def told(self) -> list[str]:
        """For people: how many clips there are, and what is not trained on."""
        clips = self.clips
        by_size = [f"{size}: {count}" for size, count in clips.items()] if len(clips) > 1 else []
        clauses = [f"training on {sum(clips.values())} clips"]
        clauses[0] += f" ({', '.join(by_size)})" if by_size else ""
        if self.held_out:
            clauses.append(f"held out for validation: {len(self.held_out)}")
        return [*clauses, *self.left_out.told()]

    @property
    def readers(self) -> dict[str, StoreReader]:
        """The stores that are read, by kind; those of one size among several name it too."""
        if len(self.stores) == 1:
            return self.stores[0].readers
        named = {
            kind if kind == "text" else f"{kind} {stores.size}": reader
            for stores in self.stores
            for kind, reader in stores.readers.items()
        }
        return dict(sorted(named.items(), key=lambda item: item[0] != "text"))

    @property
    def teacher(self) -> StoreReader | None:
        """The teacher's store of the first size: what it says of the teacher, all of them say."""
        return self.stores[0].teacher

    @property
    def teacher_form(self) -> TeacherForm | None:
        """What is stored of the teacher, or None without one."""
        return self.stores[0].teacher_form

    @property
    def frame_rate(self) -> bool:
        """Whether the teacher has a map for each frame; the same at every size."""
        return self.stores[0].teacher_maps == self.stores[0].num_frames


def join_buckets(
    cache_root: Path | str,
    sizes: Sequence[ClipsConfig],
    chosen: Mapping[str, Sequence[str]],
    *,
    kinds: Sequence[str],
    leave_out: Path | None = None,
    held_out: int = 0,
    held_out_before: Sequence[str] | None = None,
) -> Buckets:
    """Open the stores of each size and join them by key.

    A clip that is held out is so at every size that it has.

    Args:
        cache_root: folder of the stores, or its URL.
        sizes: `ClipsConfig.sizes`.
        chosen: folder names per kind, needed where several stores of a kind hold clips of one size.
        kinds: what is read beside text and latents: teacher or gram_flow, and masks.
        leave_out: manifest of clips to leave out (`left_out.read_keys`).
        held_out: how many clips to keep for validation, of all sizes together.
        held_out_before: those that the run held out when it began: of them those that are there
            are held out, and no others.

    Raises:
        ValueError: `chosen` names an unknown kind, the manifest is malformed, or a size has no
            clip, none that is left to train on, or another teacher than the first; or the entries
            of a clip were made from different sources.
        CacheError: a store is missing, ambiguous or damaged.
    """
    named = frozenset() if leave_out is None else read_keys(leave_out)
    opened = [open_stores(cache_root, chosen, kinds=kinds, size=size) for size in sizes]
    common = [common_keys(readers) for readers in opened]
    for size, readers, keys in zip(sizes, opened, common, strict=True):
        if not keys:
            told = no_common_clip(cache_root, readers)
            if len(sizes) > 1:
                told = f"{size.size_name}: {told}, or take it out of data.buckets"
            raise ValueError(told)
    remaining = [keys.take(rows_without(keys, named)) for keys in common]
    if held_out_before is None:
        held = choose_held_out(remaining, held_out)
    else:
        held = tuple(key for key in held_out_before if any(key in keys for keys in remaining))
    stores = tuple(
        joined(readers, keys, leave_out=leave_out, named=named, held_out=held)
        for readers, keys in zip(opened, common, strict=True)
    )
    for other in stores[1:]:
        _check_one_teacher(stores[0], other)
    left_out = stores[0].left_out if len(stores) == 1 else _all_left_out(stores, opened, common)
    return Buckets(stores=stores, held_out=held, left_out=left_out)


_SAM2 = ("checkpoint_sha256", "image_size", "subjects", "directions")


def _check_one_teacher(first: JoinedStores, other: JoinedStores) -> None:
    """One projector learns from the teacher's stores of all sizes."""
    if first.teacher is None or other.teacher is None:
        return
    found, wanted = _about_teacher(other), _about_teacher(first)
    for name, value in found.items():
        if value != wanted[name]:
            raise ValueError(
                f"{other.teacher.path} ({other.size}) has {name} {value!r}, "
                f"{first.teacher.path} ({first.size}) has {wanted[name]!r}; all sizes of a run "
                "need one teacher: choose stores with train.stores, or extract again"
            )


def _about_teacher(stores: JoinedStores) -> dict[str, Any]:
    teacher = stores.teacher
    assert teacher is not None
    values = teacher.settings.values
    names = (*_SAM2, "features", "fusion", "forward_weight", "parts")
    about: dict[str, Any] = {name: values.get(name) for name in names}
    about["a map for each frame"] = stores.teacher_maps == stores.num_frames
    if stores.teacher_form == "features":
        about["native parts"] = stores.native_parts
        about["channels"] = array_shape(teacher, "features")[-1]
    return about


def _all_left_out(
    stores: Sequence[JoinedStores],
    opened: Sequence[Mapping[str, StoreReader]],
    common: Sequence[Sequence[str]],
) -> LeftOut:
    """The counts of all sizes; text is one store, read at every size."""
    lacking: Counter[str] = Counter()
    skipped: dict[str, Counter[str]] = {kind: Counter() for kind in opened[0]}
    for of_size in stores:
        lacking.update(of_size.left_out.not_in_every_store)
        for kind, reasons in of_size.left_out.skipped.items():
            if kind != "text" or of_size is stores[0]:
                skipped[kind].update(reasons)
    texts = {reader.name: len(reader) for reader in (readers["text"] for readers in opened)}
    lacking["text"] = sum(texts.values()) - len(set().union(*common))
    return LeftOut(
        not_in_every_store={kind: lacking[kind] for kind in opened[0]},
        skipped={kind: dict(reasons.most_common()) for kind, reasons in skipped.items()},
        manifest=stores[0].left_out.manifest,
        named=sum(of_size.left_out.named for of_size in stores),
    )
