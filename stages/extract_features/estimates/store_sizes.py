"""Bytes of a clip in each store, from its arrays; and in each form of the teacher, to choose from.

`estimate` adds up from here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from cache_schema import ArraySpec
from stages.clips import ClipsConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.subjects.subject_stores import subject_settings
from stages.teacher_forms.config import FeatureDtype, FlowDtype

COMPRESSED_SHARE = 0.5
"""What is left of a compressed array. Measured on Gram flows of 49 maps and 30x45 tokens: 0.30 on
real clips with an untrained sam2.1_hiera_t, whose features are smooth, to 0.69 on rough noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormSize:
    """One form of the teacher, in one number format."""

    kind: Kind
    dtype: str
    bytes_per_clip: int
    is_compressed: bool
    """The size is about this, by `COMPRESSED_SHARE`."""
    is_chosen: bool
    """The run writes it."""


def bytes_of(arrays: Mapping[str, ArraySpec]) -> int:
    """Of one clip; the store adds checksums and records, well under 1%."""
    return round(sum(_array_bytes(spec) for spec in arrays.values()))


def is_compressed(arrays: Mapping[str, ArraySpec]) -> bool:
    """Whether the size of most of it is not known before it is written."""
    packed = sum(_array_bytes(spec) for spec in arrays.values() if spec.compression != "none")
    return 2 * packed > bytes_of(arrays)


def teacher_form_sizes(
    config: ExtractConfig, clips: ClipsConfig, *, channels: int
) -> tuple[FormSize, ...]:
    """What a clip takes in every form of the teacher, chosen or not.

    Args:
        config: What would be extracted.
        clips: The size and length of clips.
        channels: Of the features of one direction of one subject.
    """
    choices: list[tuple[Kind, str]] = [
        *(("teacher", dtype) for dtype in get_args(FeatureDtype)),
        *(("gram_flow", dtype) for dtype in get_args(FlowDtype)),
    ]
    chosen = {"teacher": config.teacher.dtype, "gram_flow": config.gram_flow.dtype}
    sizes = []
    for kind, dtype in choices:
        teacher, flow = config.teacher, config.gram_flow
        if kind == "teacher":
            teacher = teacher.model_copy(update={"dtype": dtype})
        else:
            flow = flow.model_copy(update={"dtype": dtype})
        settings = subject_settings(teacher, clips, {}, gram_flow=flow, channels=channels)
        arrays = settings[kind].arrays
        sizes.append(
            FormSize(
                kind=kind,
                dtype=dtype,
                bytes_per_clip=bytes_of(arrays),
                is_compressed=is_compressed(arrays),
                is_chosen=kind in config.kinds and chosen[kind] == dtype,
            )
        )
    return tuple(sizes)


def _array_bytes(spec: ArraySpec) -> float:
    raw = math.prod(spec.shape) * spec.numpy_dtype.itemsize
    return raw if spec.compression == "none" else raw * COMPRESSED_SHARE
