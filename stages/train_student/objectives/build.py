"""Construction of the auxiliary losses and their heads, and the stores that the losses read."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn

from cache_schema import StoreSettings
from stages.students.student import StudentConfigs
from stages.teacher_store.settings import check_both_tracks, stored_forward_weight
from stages.train_student.config import KIND_OF_FORM, TrainConfig
from stages.train_student.model.published_projectors import Convolution, PublishedProjector, mlp
from stages.train_student.model.student import Downsampler, Projector
from stages.train_student.objectives.config import ObjectiveName
from stages.train_student.objectives.lgf import LocalGramFlow
from stages.train_student.objectives.mask import MaskSupervision
from stages.train_student.objectives.objective import Objective
from stages.train_student.objectives.repa import Repa
from stages.train_student.objectives.token_relation import TokenRelation

_OBJECTIVES: dict[ObjectiveName, type[Objective[Any]]] = {
    "lgf": LocalGramFlow,
    "repa": Repa,
    "token-relation": TokenRelation,
    "mask": MaskSupervision,
}


def build_objectives(config: TrainConfig) -> tuple[Objective[Any], ...]:
    """Build the objectives that `config` names, in its order; none for plain fine-tuning."""
    return tuple(
        _OBJECTIVES[name](name=name, settings=config.settings_of(name), steps=config.steps)
        for name in config.objectives
    )


def build_heads(
    config: TrainConfig,
    configs: StudentConfigs,
    teacher: StoreSettings | None,
    *,
    frame_rate: bool = True,
    visual: StoreSettings | None = None,
) -> nn.ModuleDict:
    """Build the projector of each objective, by name.

    Args:
        config: names the objectives and their layer widths.
        configs: of the base model, whose tokens the heads receive. With more than one latent frame
            per token (CogVideoX 1.5), tokens are also interpolated and smoothed at the latent rate.
        teacher: settings of the store of `train.teacher_form`; None if no objective reads one.
        frame_rate: whether the teacher has one map per frame, to which tokens are interpolated and
            smoothed.
        visual: settings of the visual store; None if no objective reads one.
    """
    width = configs.width
    at_latents = configs.patch_size_t > 1
    heads = nn.ModuleDict()
    for name in config.objectives:
        source, interpolated, of_tubelets = teacher, frame_rate, False
        if config.settings_of(name).reads_visual:
            assert visual is not None, f"{name} reads a visual store"
            source, rate = visual, visual.values.get("time_rate")
            interpolated, of_tubelets = rate != "latent", rate == "tubelet"
        widths: Sequence[int] = config.lgf.projector_widths
        smooth = interpolated or at_latents
        kind, downsample = "residual", None
        if name == "repa":
            assert source is not None, "repa reads features"
            kind = config.repa.projector
            widths = (*config.repa.projector_widths, source.arrays["features"].shape[-1])
        elif name == "token-relation":
            settings = config.token_relation
            kind, widths = settings.projector, settings.projector_widths
            smooth = at_latents or of_tubelets
            downsample = settings.pool if settings.downsampler == "learned" else None
        elif name == "mask":
            widths, smooth = (*config.mask.projector_widths, 1), True
        if kind == "residual":
            heads[name] = Projector(width, widths, smooth=smooth, downsample=downsample)
            continue
        heads[name] = PublishedProjector(
            Convolution(width, widths[-1]) if kind == "convolution" else mlp((width, *widths)),
            None if downsample is None else Downsampler(widths[-1], downsample),
        )
    return heads


def kinds_needed(config: TrainConfig) -> tuple[str, ...]:
    """Store kinds to read in addition to text and latents: the teacher's, visual, then masks.

    Raises:
        ValueError: an objective cannot use `train.teacher_form`, or its kernel is not installed.
    """
    if "lgf" in config.objectives and config.lgf.kernel == "triton" and not find_spec("triton"):
        raise ValueError(
            "train.lgf.kernel=triton needs the package triton, which CUDA builds of torch bring; "
            "install it (pip install triton), or set train.lgf.kernel=torch"
        )
    chosen = set(config.objectives)
    if config.teacher_form == "gram_flow":
        _check_gram_flow_suffices(config)
    of_visual = {name for name in chosen if config.settings_of(name).reads_visual}
    kinds = [KIND_OF_FORM[config.teacher_form]] if chosen - of_visual - {"mask"} else []
    if of_visual:
        kinds.append("visual")
    if "mask" in chosen or ("lgf" in chosen and config.lgf.foreground_weight != 1.0):
        kinds.append("masks")
    return tuple(kinds)


def check_teacher(config: TrainConfig, teacher: StoreSettings | None, name: str) -> None:
    """Reject a teacher store without the tracks or pairs that `train.lgf` compares.

    Args:
        config: names the objectives and their settings.
        teacher: settings of the store of `train.teacher_form`, existing or planned; None if no
            objective reads one.
        name: the store's name, for the message.

    Raises:
        ValueError: names the store and what it lacks.
    """
    if teacher is None or "lgf" not in config.objectives:
        return
    if teacher.kind == "gram_flow":
        _check_pairs(config, teacher, name)
        return
    if config.lgf.pairs == "crossed":
        check_both_tracks(teacher, name, wanted_by="train.lgf.pairs=crossed")
    directions, share = config.lgf.directions, stored_forward_weight(teacher)
    if directions == "fused":
        return
    if share is None:
        raise ValueError(
            f"train.lgf.directions={directions} needs features fused in Gram-flow space, from "
            f"which both directions can be recovered; those of {name} are not: extract with "
            "extract.teacher.fusion=gram_flow, or train with train.lgf.directions=fused"
        )
    if directions == "forward" and share == 0.0:
        raise ValueError(
            f"train.lgf.directions=forward cannot use {name}, whose forward direction has weight "
            "0; extract with extract.teacher.forward_weight=0.5"
        )


def _check_pairs(config: TrainConfig, flow: StoreSettings, name: str) -> None:
    """Similarities of fused features can be reversed; per-track ones only fit `crossed`."""
    pairs, held = config.lgf.pairs, flow.values.get("pairs")
    needed = "crossed" if pairs == "crossed" else "forward"
    if held != needed:
        raise ValueError(
            f"{name} holds a Gram flow with pairs {held}; train.lgf.pairs={pairs} needs pairs "
            f"{needed}: make it with sam2vx-pipeline cache derive gram-flow "
            f"extract.gram_flow.pairs={needed} or with extract-features, and name it in "
            "train.stores.gram_flow; or train with train.teacher_form=features"
        )


def _check_gram_flow_suffices(config: TrainConfig) -> None:
    unmet = [
        f"train.objectives={name}"
        for name in config.objectives
        if name in ("repa", "token-relation") and not config.settings_of(name).reads_visual
    ]
    if "lgf" in config.objectives and config.lgf.directions != "fused":
        unmet.append(f"train.lgf.directions={config.lgf.directions}")
    if unmet:
        raise ValueError(
            f"{' and '.join(unmet)} cannot be computed from a stored Gram flow, which holds "
            "only similarities; train with train.teacher_form=features"
        )
