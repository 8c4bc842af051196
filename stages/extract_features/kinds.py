"""Build and check the extractions of a configuration."""

from collections.abc import Mapping, Sequence

import torch

from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.extraction import Extraction
from stages.extract_features.latents import LatentsExtraction
from stages.extract_features.text import TextExtraction
from stages.extract_features.visual.extraction import VisualExtraction
from stages.students.hub import resolve_base_model
from stages.students.registry import BASE_CONFIGS, image_parts, read_configs
from stages.students.weights import Part, check_base_weights, latents_parts

_BASE_PARTS: Mapping[Kind, tuple[Part, ...]] = {
    "text": ("tokenizer", "text_encoder"),
    "latents": ("vae",),
}
TRACKED_KINDS: tuple[Kind, ...] = ("teacher", "gram_flow", "masks")
"""Kinds that are written in one pass of SAM2 over a clip."""


def make_extractions(
    config: ExtractConfig, sizes: Sequence[ClipsConfig], model: BaseModelConfig
) -> list[Extraction]:
    """Build one extraction per required model and clip size, in the order of `config.kinds`.

    The kinds that SAM2 fills share one extraction, at the position of the first of them.
    Everything that can be checked without loading a model is checked here.

    Args:
        config: Kinds to extract and their settings.
        sizes: Clip sizes, some or all of `ClipsConfig.sizes`; text has no size.
        model: The base pipeline.

    Raises:
        ValueError: A part of the base model, SAM2's checkpoint, the visual encoder or another
            required file is missing or does not match.
    """
    made: list[Extraction] = []
    parts = [part for kind in config.kinds for part in _BASE_PARTS.get(kind, ())]
    base = None
    if parts:
        folder = resolve_base_model(model, (*BASE_CONFIGS, *parts))
        if "latents" in config.kinds and (of_image := image_parts(folder)):
            folder = resolve_base_model(model, (*BASE_CONFIGS, *parts, *of_image))
            parts += latents_parts(folder)
        base = read_configs(folder)
        check_base_weights(base.folder, parts)
    for kinds in group_kinds(config.kinds):
        if kinds[0] == "visual":
            made += [VisualExtraction(config.visual, size) for size in sizes]
            continue
        if kinds[0] in TRACKED_KINDS:
            # Imports sam2, which the other kinds do not need.
            from stages.extract_features.teacher.extraction import SubjectExtraction

            made += [
                SubjectExtraction(config.teacher, size, gram_flow=config.gram_flow, kinds=kinds)
                for size in sizes
            ]
            continue
        assert base is not None
        if kinds[0] == "latents":
            made += [
                LatentsExtraction(config.latents, size, base, seed=config.seed) for size in sizes
            ]
        else:
            made.append(TextExtraction(config.text, base))
    return made


def group_kinds(kinds: tuple[Kind, ...]) -> list[tuple[Kind, ...]]:
    """Group the kinds that are written in one pass; duplicates are dropped."""
    unique = tuple(dict.fromkeys(kinds))
    groups: list[tuple[Kind, ...]] = []
    for kind in unique:
        together = (
            tuple(k for k in unique if k in TRACKED_KINDS) if kind in TRACKED_KINDS else (kind,)
        )
        if together not in groups:
            groups.append(together)
    return groups


def resolve_device(name: str, rank: int) -> torch.device:
    """Return a worker's device; auto assigns the machine's GPUs by rank.

    Raises:
        ValueError: The device does not exist.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"extract.device={name} is not a torch device; auto is usual") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"extract.device={name}, but this machine has {gpus} CUDA devices")
    return device
