"""Stores of a run: one of each kind per clip size, joined by clip key, with one held-out split."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import SortedText, StoreReader
from stages.clips.config import ClipsConfig
from stages.local_gram_flow.alignment import TEMPORAL_COMPRESSION
from stages.students.student import VAE_SPATIAL_COMPRESSION, StudentConfigs
from stages.teacher_store.settings import native_parts
from stages.train_student.config import KIND_OF_FORM, TeacherForm
from stages.train_student.data.open_stores import (
    check_same_sources,
    open_stores,
    other_prompt_settings,
)
from stages.train_student.data.splits import (
    ExcludedClips,
    choose_held_out,
    count_reasons,
    read_keys,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedStores:
    """Readers of one store per kind, with the sorted keys to train on and the held-out keys."""

    text: StoreReader
    latents: StoreReader
    teacher: StoreReader | None
    """The teacher or gram_flow store; None if no auxiliary loss reads one."""
    masks: StoreReader | None
    """The masks store; None if no auxiliary loss reads it."""
    visual: StoreReader | None = None
    """The visual store; None if no auxiliary loss reads it."""
    keys: SortedText
    """Training clips: in all stores, neither excluded nor held out."""
    held_out: tuple[str, ...]
    """Validation clips, in the order in which they were chosen."""
    excluded: ExcludedClips

    @property
    def readers(self) -> dict[str, StoreReader]:
        """Store readers by kind."""
        readers = (self.text, self.latents, self.teacher, self.masks, self.visual)
        return {reader.settings.kind: reader for reader in readers if reader is not None}

    @property
    def num_frames(self) -> int:
        """Frames per clip, from the latents' shape."""
        return TEMPORAL_COMPRESSION * (array_shape(self.latents, "mean")[0] - 1) + 1

    @property
    def size(self) -> str:
        """Frames, height and width of the clips, from the latents' shape: `49x480x720`."""
        _, _, height, width = array_shape(self.latents, "mean")
        spatial = VAE_SPATIAL_COMPRESSION
        return f"{self.num_frames}x{spatial * height}x{spatial * width}"

    @property
    def teacher_form(self) -> TeacherForm | None:
        """Stored form of the teacher; None without one."""
        if self.teacher is None:
            return None
        return "gram_flow" if self.teacher.settings.kind == "gram_flow" else "features"

    @property
    def teacher_maps(self) -> int | None:
        """Maps per clip in the teacher's store; None without a teacher."""
        if self.teacher is None:
            return None
        if self.teacher_form == "gram_flow":
            return array_shape(self.teacher, "gram_flow")[0] + 1
        return array_shape(self.teacher, "features")[0]

    @property
    def native_parts(self) -> int | None:
        """Number of channel parts of teacher features on SAM2's own grid.

        None without a teacher, and if features are on the student's grid already.
        """
        if self.teacher is None or self.teacher_form != "features":
            return None
        return native_parts(self.teacher.settings)

    @property
    def warning(self) -> str | None:
        """A warning if the masks were tracked from other prompts than the teacher's features."""
        if self.teacher is None or self.masks is None:
            return None
        differing = other_prompt_settings(self.teacher, self.masks)
        if not differing:
            return None
        return (
            f"{self.masks.path} was tracked with other {' and '.join(differing)} than "
            f"{self.teacher.path}: their subjects may differ; choose stores of one extraction "
            "with train.stores.masks"
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
    def visual(self) -> StoreReader | None:
        """Visual store of the first size; the stores of all sizes share the encoder's settings."""
        return self.stores[0].visual

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
    student: StudentConfigs | None = None,
) -> Buckets:
    """Open the stores of each size and join them by key.

    A held-out clip is held out at every size.

    Args:
        cache_root: folder of the stores, or its URL.
        sizes: `ClipsConfig.sizes`.
        chosen: folder names per kind, needed if several stores of a kind hold clips of one size.
        kinds: kinds to read in addition to text and latents: teacher or gram_flow, visual, masks.
        leave_out: manifest of clips to exclude (`splits.read_keys`).
        held_out: number of validation clips, over all sizes.
        held_out_before: clips that a resumed run held out when it started; exactly those of them
            that still exist are held out.
        student: the base model, which decides between the text and latents stores of several.

    Raises:
        ValueError: `chosen` names an unknown kind, the manifest is malformed, a size has no clip or
            none left to train on, the teacher differs between sizes, or the entries of a clip were
            made from different sources.
        CacheError: a store is missing, ambiguous or damaged.
    """
    named = frozenset() if leave_out is None else read_keys(leave_out)
    opened = [
        open_stores(cache_root, chosen, kinds=kinds, size=size, student=student) for size in sizes
    ]
    common: list[SortedText] = []
    for size, readers in zip(sizes, opened, strict=True):
        first, *others = (reader.keys for reader in readers.values())
        common.append(first.in_all(*others))
        if not common[-1]:
            counts = ", ".join(f"{kind} {len(reader)}" for kind, reader in readers.items())
            message = (
                f"no clip is in every store of {cache_root} ({counts}); extract all kinds from the "
                "same clips with sam2vx-pipeline extract-features"
            )
            if len(sizes) > 1:
                message = f"{size.size_name}: {message}, or remove this size from data.buckets"
            raise ValueError(message)
    remaining = [_without(keys, named) for keys in common]
    if held_out_before is None:
        held = choose_held_out(remaining, held_out)
    else:
        held = tuple(key for key in held_out_before if any(key in keys for keys in remaining))
    stores = tuple(
        _join(*of_size, leave_out=leave_out, held_out=held)
        for of_size in zip(opened, common, remaining, strict=True)
    )
    for other in stores[1:]:
        _check_same_teacher(stores[0], other)
    excluded = stores[0].excluded if len(stores) == 1 else _all_excluded(stores, opened, common)
    return Buckets(stores=stores, held_out=held, excluded=excluded)


def _join(
    readers: Mapping[str, StoreReader],
    common: SortedText,
    remaining: SortedText,
    *,
    leave_out: Path | None,
    held_out: Sequence[str],
) -> JoinedStores:
    """Join the stores of one size.

    Args:
        common: clips in every store.
        remaining: those that the manifest `leave_out` does not exclude.
        held_out: validation clips of all sizes.
    """
    if not remaining:
        raise ValueError(
            f"train.leave_out {leave_out} names every one of the {len(common)} clips that are in "
            "every store; nothing is left to train on"
        )
    check_same_sources(readers, remaining)
    keys = _without(remaining, held_out)
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
        visual=readers.get("visual"),
        keys=keys,
        held_out=tuple(key for key in held_out if key in remaining),
        excluded=ExcludedClips(
            not_in_every_store={
                kind: len(reader) - len(common) for kind, reader in readers.items()
            },
            skipped={kind: count_reasons(reader.skipped) for kind, reader in readers.items()},
            manifest=None if leave_out is None else str(leave_out),
            named=len(common) - len(remaining),
        ),
    )


def _without(keys: SortedText, named: Iterable[str]) -> SortedText:
    rows = [row for key in named if (row := keys.find(key)) is not None]
    return keys.take(np.delete(np.arange(len(keys)), rows))


_TRACKER_SETTINGS = ("tracker", "checkpoint_sha256", "image_size", "subjects", "directions")


def _check_same_teacher(first: JoinedStores, other: JoinedStores) -> None:
    """Check that the teacher stores agree, and the visual ones, since all sizes train one projector
    for each."""
    for mine, theirs, properties in (
        (first.teacher, other.teacher, _teacher_properties),
        (first.visual, other.visual, _visual_properties),
    ):
        if mine is None or theirs is None:
            continue
        expected = properties(first)
        for name, value in properties(other).items():
            if value != expected[name]:
                raise ValueError(
                    f"{theirs.path} ({other.size}) has {name} {value!r}, "
                    f"{mine.path} ({first.size}) has {expected[name]!r}; all sizes of a run "
                    "need the same teacher: choose stores with train.stores, or extract again"
                )


def _visual_properties(stores: JoinedStores) -> dict[str, Any]:
    assert stores.visual is not None
    names = ("checkpoint_sha256", "layer", "time_rate", "frames_per_map", "grid_source")
    values = stores.visual.settings.values
    properties: dict[str, Any] = {name: values.get(name) for name in names}
    properties["channels"] = array_shape(stores.visual, "features")[-1]
    return properties


def _teacher_properties(stores: JoinedStores) -> dict[str, Any]:
    teacher = stores.teacher
    assert teacher is not None
    values = teacher.settings.values
    names = (*_TRACKER_SETTINGS, "features", "fusion", "forward_weight", "parts")
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
