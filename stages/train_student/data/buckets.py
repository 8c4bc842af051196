"""Joined stores of every clip size of a run, with one held-out split over all sizes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema import StoreReader
from stages.clips.config import ClipsConfig
from stages.train_student.config import TeacherForm
from stages.train_student.data.splits import ExcludedClips, choose_held_out, read_keys
from stages.train_student.data.stores import (
    JoinedStores,
    array_shape,
    common_keys,
    describe_no_common_clip,
    join_readers,
    open_stores,
    rows_without,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """Joined stores of a run, one per clip size."""

    stores: tuple[JoinedStores, ...]
    """One per size, at least one."""
    held_out: tuple[str, ...]
    """Keys of the validation clips, in the order in which they were chosen."""
    excluded: ExcludedClips
    """Excluded clips, over all sizes."""

    @property
    def clips(self) -> dict[str, int]:
        """Number of training clips by size."""
        return {stores.size: len(stores.keys) for stores in self.stores}

    def describe(self) -> list[str]:
        """Clauses for the log: number of training clips, held-out and excluded clips."""
        clips = self.clips
        by_size = [f"{size}: {count}" for size, count in clips.items()] if len(clips) > 1 else []
        clauses = [f"training on {sum(clips.values())} clips"]
        clauses[0] += f" ({', '.join(by_size)})" if by_size else ""
        if self.held_out:
            clauses.append(f"held out for validation: {len(self.held_out)}")
        return [*clauses, *self.excluded.describe()]

    @property
    def readers(self) -> dict[str, StoreReader]:
        """Store readers by kind; with several sizes the key of a sized store includes the size."""
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
        """Teacher store of the first size; the stores of all sizes share the teacher's settings."""
        return self.stores[0].teacher

    @property
    def teacher_form(self) -> TeacherForm | None:
        """Stored form of the teacher; None without one."""
        return self.stores[0].teacher_form

    @property
    def frame_rate(self) -> bool:
        """Whether the teacher has one map per frame; the same at every size."""
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

    A held-out clip is held out at every size.

    Args:
        cache_root: folder of the stores, or its URL.
        sizes: `ClipsConfig.sizes`.
        chosen: folder names per kind, needed if several stores of a kind hold clips of one size.
        kinds: kinds to read in addition to text and latents: teacher or gram_flow, and masks.
        leave_out: manifest of clips to exclude (`splits.read_keys`).
        held_out: number of validation clips, over all sizes.
        held_out_before: clips that a resumed run held out when it started; exactly those of them
            that still exist are held out.

    Raises:
        ValueError: `chosen` names an unknown kind, the manifest is malformed, a size has no clip or
            none left to train on, the teacher differs between sizes, or the entries of a clip were
            made from different sources.
        CacheError: a store is missing, ambiguous or damaged.
    """
    named = frozenset() if leave_out is None else read_keys(leave_out)
    opened = [open_stores(cache_root, chosen, kinds=kinds, size=size) for size in sizes]
    common = [common_keys(readers) for readers in opened]
    for size, readers, keys in zip(sizes, opened, common, strict=True):
        if not keys:
            message = describe_no_common_clip(cache_root, readers)
            if len(sizes) > 1:
                message = f"{size.size_name}: {message}, or remove this size from data.buckets"
            raise ValueError(message)
    remaining = [keys.take(rows_without(keys, named)) for keys in common]
    if held_out_before is None:
        held = choose_held_out(remaining, held_out)
    else:
        held = tuple(key for key in held_out_before if any(key in keys for keys in remaining))
    stores = tuple(
        join_readers(readers, keys, leave_out=leave_out, named=named, held_out=held)
        for readers, keys in zip(opened, common, strict=True)
    )
    for other in stores[1:]:
        _check_same_teacher(stores[0], other)
    excluded = stores[0].excluded if len(stores) == 1 else _all_excluded(stores, opened, common)
    return Buckets(stores=stores, held_out=held, excluded=excluded)


_SAM2_SETTINGS = ("checkpoint_sha256", "image_size", "subjects", "directions")


def _check_same_teacher(first: JoinedStores, other: JoinedStores) -> None:
    """Check that the teacher stores agree, since all sizes train one projector."""
    if first.teacher is None or other.teacher is None:
        return
    found, expected = _teacher_properties(other), _teacher_properties(first)
    for name, value in found.items():
        if value != expected[name]:
            raise ValueError(
                f"{other.teacher.path} ({other.size}) has {name} {value!r}, "
                f"{first.teacher.path} ({first.size}) has {expected[name]!r}; all sizes of a run "
                "need the same teacher: choose stores with train.stores, or extract again"
            )


def _teacher_properties(stores: JoinedStores) -> dict[str, Any]:
    teacher = stores.teacher
    assert teacher is not None
    values = teacher.settings.values
    names = (*_SAM2_SETTINGS, "features", "fusion", "forward_weight", "parts")
    properties: dict[str, Any] = {name: values.get(name) for name in names}
    properties["one map per frame"] = stores.teacher_maps == stores.num_frames
    if stores.teacher_form == "features":
        properties["native parts"] = stores.native_parts
        properties["channels"] = array_shape(teacher, "features")[-1]
    return properties


def _all_excluded(
    stores: Sequence[JoinedStores],
    opened: Sequence[Mapping[str, StoreReader]],
    common: Sequence[Sequence[str]],
) -> ExcludedClips:
    """Sum the counts over sizes; text is one store shared by all sizes."""
    lacking: Counter[str] = Counter()
    skipped: dict[str, Counter[str]] = {kind: Counter() for kind in opened[0]}
    for of_size in stores:
        lacking.update(of_size.excluded.not_in_every_store)
        for kind, reasons in of_size.excluded.skipped.items():
            if kind != "text" or of_size is stores[0]:
                skipped[kind].update(reasons)
    texts = {reader.name: len(reader) for reader in (readers["text"] for readers in opened)}
    lacking["text"] = sum(texts.values()) - len(set().union(*common))
    return ExcludedClips(
        not_in_every_store={kind: lacking[kind] for kind in opened[0]},
        skipped={kind: dict(reasons.most_common()) for kind, reasons in skipped.items()},
        manifest=stores[0].excluded.manifest,
        named=sum(of_size.excluded.named for of_size in stores),
    )
