"""Stores that an extraction would write: their names, bytes per clip, and the cost of each model.

Only configuration files are downloaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from cache_schema import ArraySpec, StoreSettings
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.dry_run.extract_costs import (
    ModelCost,
    latents_cost,
    text_cost,
    tracker_cost,
    visual_cost,
)
from stages.extract_features.config import ExtractConfig, Kind, TeacherConfig
from stages.extract_features.extraction import bucket_name
from stages.extract_features.kinds import group_kinds
from stages.extract_features.latents import LatentsExtraction, latents_arrays
from stages.extract_features.teacher.extraction import SubjectExtraction
from stages.extract_features.teacher.stores import subject_settings
from stages.extract_features.text import TextExtraction, text_arrays
from stages.extract_features.visual.encoder import find_encoder, layout_of
from stages.extract_features.visual.extraction import VisualExtraction, visual_settings
from stages.sam2_tracking.opening import check_tracker, config_source, find_checkpoint
from stages.students.official_models import configs_for_estimate
from stages.students.student import StudentConfigs
from stages.students.weights import latents_parts, parts_are_here
from stages.teacher_store.config import FeatureDtype, FlowDtype
from stages.visual_models.folders import has_weights

COMPRESSED_SHARE = 0.5
"""Assumed ratio of compressed to raw size. Measured on Gram flows of 49 maps and 30x45 tokens: 0.30
on real clips with an untrained sam2.1_hiera_t, whose features are smooth, to 0.69 on noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingEstimate:
    """Estimate for one encoding of the teacher signal in one dtype, whether the run writes it or
    not."""

    kind: Kind
    dtype: str
    bucket: str | None
    """Size bucket of its clips; None without buckets."""
    chosen: bool
    """Whether the run writes it."""
    clips: int = 0
    """Clips of the dataset that would not be skipped; 0 until the dataset is surveyed."""
    bytes_per_clip: int
    compressed: bool
    """The size is an estimate, based on `COMPRESSED_SHARE`."""

    @property
    def bytes(self) -> int:
        """Bytes for the whole dataset."""
        return self.clips * self.bytes_per_clip


def bytes_of(arrays: Mapping[str, ArraySpec]) -> int:
    """Return the bytes of one clip's arrays; checksums and records add well under 1%."""
    return round(sum(_array_bytes(spec) for spec in arrays.values()))


def is_compressed(arrays: Mapping[str, ArraySpec]) -> bool:
    """Whether more than half of the size is an estimate, because it is compressed."""
    packed = sum(_array_bytes(spec) for spec in arrays.values() if spec.compression != "none")
    return 2 * packed > bytes_of(arrays)


def teacher_encodings(
    config: ExtractConfig, clips: ClipsConfig, *, channels: int, stride: int
) -> tuple[EncodingEstimate, ...]:
    """Return the size of a clip in every encoding of the teacher signal.

    Args:
        config: Settings of the extraction.
        clips: Size and length of clips.
        channels: Feature channels of one direction of one subject.
        stride: Pixels of the tracker's input per token.
    """
    choices: list[tuple[Kind, str, str]] = [
        *(("teacher", dtype, config.teacher.dtype) for dtype in get_args(FeatureDtype)),
        *(("gram_flow", dtype, config.gram_flow.dtype) for dtype in get_args(FlowDtype)),
    ]
    encodings = []
    for kind, dtype, chosen in choices:
        section = getattr(config, kind).model_copy(update={"dtype": dtype})
        changed = config.model_copy(update={kind: section})
        arrays = _subject_settings(changed, clips, channels, stride)[kind].arrays
        encodings.append(
            EncodingEstimate(
                kind=kind,
                dtype=dtype,
                bucket=bucket_name(clips),
                chosen=kind in config.kinds and chosen == dtype,
                bytes_per_clip=bytes_of(arrays),
                compressed=is_compressed(arrays),
            )
        )
    return tuple(encodings)


def _subject_settings(
    config: ExtractConfig, clips: ClipsConfig, channels: int, stride: int
) -> Mapping[Kind, StoreSettings]:
    return subject_settings(
        config.teacher,
        clips,
        {},
        gram_flow=config.gram_flow,
        channels=channels,
        stride=stride,
    )


def _array_bytes(spec: ArraySpec) -> float:
    raw = math.prod(spec.shape) * spec.numpy_dtype.itemsize
    return raw if spec.compression == "none" else raw * COMPRESSED_SHARE


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPass:
    """One model's pass over the clips, and the stores it fills."""

    kinds: tuple[Kind, ...]
    bucket: str | None = None
    """Size bucket of its clips; None without buckets, and for text."""
    arrays: Mapping[Kind, Mapping[str, ArraySpec]] | None
    """Array specs of a clip by kind; None if the model's configuration is not available."""
    folders: Mapping[Kind, str] | None
    """Store names by kind; None if the weights, whose hash they contain, are not available."""
    cost: ModelCost | None
    encodings: tuple[EncodingEstimate, ...] = ()
    """For a pass of SAM2, each encoding of the teacher signal."""
    notes: tuple[str, ...] = ()
    """Unknown values, and why they are unknown."""


def planned_passes(
    config: ExtractConfig, clips: ClipsConfig, model: BaseModelConfig
) -> list[PlannedPass]:
    """Return the passes of a run in order.

    Raises:
        ValueError: A setting is wrong, with the message of the run itself. Weights of a hub id
            that are not on this machine are not an error.
    """
    base, notes = _read_base(config, model)
    passes: list[PlannedPass] = []
    for kinds in group_kinds(config.kinds):
        if kinds[0] == "visual":
            passes += [_with_bucket(size, _visual(config, size)) for size in clips.sizes]
        elif kinds[0] not in ("text", "latents"):
            passes += [_with_bucket(size, _tracking(config, size, kinds)) for size in clips.sizes]
        elif base is None:
            passes.append(
                PlannedPass(kinds=kinds, arrays=None, folders=None, cost=None, notes=notes)
            )
        elif kinds[0] == "text":
            passes.append(_text(config, base, model))
        else:
            passes += [
                _with_bucket(size, _latents(config, size, base, model)) for size in clips.sizes
            ]
    if base is not None:
        passes[0] = replace(passes[0], notes=(*notes, *passes[0].notes))
    return passes


def _with_bucket(size: ClipsConfig, planned: PlannedPass) -> PlannedPass:
    return replace(planned, bucket=bucket_name(size))


def _read_base(
    config: ExtractConfig, model: BaseModelConfig
) -> tuple[StudentConfigs | None, tuple[str, ...]]:
    """Return the configuration of the base pipeline, if available, and notes on it."""
    if not {"text", "latents"} & set(config.kinds):
        return None, ()
    try:
        return configs_for_estimate(model, text_encoder="text" in config.kinds)
    except ValueError as error:
        if model.is_local:
            raise
        return None, (f"the configuration of {model.path} is not available: {error}",)


def _text(config: ExtractConfig, base: StudentConfigs, model: BaseModelConfig) -> PlannedPass:
    here = parts_are_here(model, base.folder, ("tokenizer", "text_encoder"))
    return _planned(
        {"text": text_arrays(base)},
        TextExtraction(config.text, base).settings if here else None,
        text_cost(config.text, base),
        missing=f"the text encoder of {model.path}",
    )


def _latents(
    config: ExtractConfig, clips: ClipsConfig, base: StudentConfigs, model: BaseModelConfig
) -> PlannedPass:
    here = parts_are_here(model, base.folder, latents_parts(base.folder))
    extraction = LatentsExtraction(config.latents, clips, base, seed=config.seed) if here else None
    return _planned(
        {"latents": latents_arrays(config.latents, clips, base)},
        extraction.settings if extraction else None,
        latents_cost(config.latents, clips, base),
        missing=f"the VAE of {model.path}",
    )


def _visual(config: ExtractConfig, clips: ClipsConfig) -> PlannedPass:
    visual = config.visual
    try:
        folder = find_encoder(visual, weights=False)
    except ValueError as error:
        return PlannedPass(
            kinds=("visual",), arrays=None, folders=None, cost=None, notes=(f"visual: {error}",)
        )
    layout = layout_of(visual, clips, folder)
    arrays = visual_settings(visual, clips, layout, checkpoint_sha256="").arrays
    return _planned(
        {"visual": arrays},
        VisualExtraction(visual, clips).settings if has_weights(folder) else None,
        visual_cost(visual, clips, layout),
        missing=f"the encoder {visual.checkpoint}",
    )


def _tracking(config: ExtractConfig, clips: ClipsConfig, kinds: tuple[Kind, ...]) -> PlannedPass:
    teacher = config.teacher
    source: str | Path
    try:
        checkpoint = find_checkpoint(teacher.checkpoint, download=False)
    except ValueError:
        found = config_source(teacher.checkpoint, teacher.config)
        if found is None:
            raise
        source, missing = found, f"the checkpoint {teacher.checkpoint}"
    else:
        spec = check_tracker(teacher.config, checkpoint, image_size=teacher.image_size)
        source, missing = spec.config_name or checkpoint, ""
    cost, channels, stride = tracker_cost(teacher, clips, source)
    if not missing and not _grounding_is_here(teacher):
        missing = f"Grounding DINO {teacher.grounding.model}"
    settings = None
    if not missing:
        extraction = SubjectExtraction(teacher, clips, gram_flow=config.gram_flow, kinds=kinds)
        settings = extraction.settings
    arrays = _subject_settings(config, clips, channels, stride)
    planned = _planned(
        {kind: arrays[kind].arrays for kind in kinds}, settings, cost, missing=missing
    )
    encodings = teacher_encodings(config, clips, channels=channels, stride=stride)
    return replace(planned, encodings=encodings)


def _grounding_is_here(config: TeacherConfig) -> bool:
    from huggingface_hub import try_to_load_from_cache

    grounding = config.grounding
    if "grounding" not in config.prompts or Path(grounding.model).expanduser().is_dir():
        return True
    found = try_to_load_from_cache(
        grounding.model, "model.safetensors", revision=grounding.revision
    )
    return isinstance(found, str)


def _planned(
    arrays: Mapping[Kind, Mapping[str, ArraySpec]],
    settings: Mapping[Kind, StoreSettings] | None,
    cost: ModelCost,
    *,
    missing: str,
) -> PlannedPass:
    """Return a pass; `settings` is None if the weights called `missing` are not available."""
    kinds = tuple(arrays)
    note = (
        f"{' and '.join(kinds)}: {missing} is not on this machine yet, so the clips "
        "already in the cache cannot be counted; the run downloads it"
    )
    return PlannedPass(
        kinds=kinds,
        arrays=arrays,
        folders=None if settings is None else {kind: settings[kind].folder_name for kind in kinds},
        cost=cost,
        notes=(note,) if settings is None else (),
    )
