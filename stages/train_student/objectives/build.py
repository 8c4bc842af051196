"""Construction of the auxiliary losses and their projector heads from the settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from stages.train_student.config import TrainConfig
from stages.train_student.model.projector import Projector
from stages.train_student.objectives.config import AuxiliaryConfig, ObjectiveName
from stages.train_student.objectives.lgf import LocalGramFlow
from stages.train_student.objectives.mask import MaskSupervision
from stages.train_student.objectives.objective import Objective
from stages.train_student.objectives.repa import Repa
from stages.train_student.objectives.token_relation import TokenRelation
from stages.train_student.objectives.weighting import WeightedObjective


def build_objectives(config: TrainConfig) -> tuple[WeightedObjective, ...]:
    """Build the objectives that `config` names, in its order; none for plain fine-tuning."""
    return tuple(
        WeightedObjective(
            name=name,
            objective=_MAKERS[name](config),
            settings=_settings(config, name),
            steps=config.steps,
        )
        for name in config.objectives
    )


def build_heads(
    config: TrainConfig,
    width: int,
    teacher_channels: int | None,
    *,
    patch_size_t: int,
    frame_rate: bool = True,
) -> nn.ModuleDict:
    """Build the projector of each objective, by name.

    Args:
        config: names the objectives and their layer widths.
        width: channels of the transformer's tokens.
        teacher_channels: channels of the stored features; None if none are read.
        patch_size_t: latent frames per token; with more than one (CogVideoX 1.5) tokens are also
            interpolated and smoothed at the latent rate.
        frame_rate: whether the teacher has one map per frame, to which tokens are interpolated and
            smoothed.
    """
    at_latents = patch_size_t > 1
    return nn.ModuleDict(
        {
            name: Projector(width, head.widths, smooth=head.smooth)
            for name in config.objectives
            for head in (_head(config, name, teacher_channels, frame_rate, at_latents),)
        }
    )


@dataclass(frozen=True, slots=True)
class _Head:
    widths: Sequence[int]
    smooth: bool


def _head(
    config: TrainConfig,
    name: ObjectiveName,
    teacher_channels: int | None,
    frame_rate: bool,
    at_latents: bool,
) -> _Head:
    """`at_latents`: tokens are also interpolated to latent frames."""
    as_teacher = frame_rate or at_latents
    if name == "lgf":
        return _Head(config.lgf.projector_widths, as_teacher)
    if name == "repa":
        assert teacher_channels is not None, "repa reads features"
        return _Head((*config.repa.projector_widths, teacher_channels), as_teacher)
    if name == "token-relation":
        return _Head(config.token_relation.projector_widths, at_latents)
    return _Head((*config.mask.projector_widths, 1), True)


def _lgf(config: TrainConfig) -> Objective:
    lgf = config.lgf
    return LocalGramFlow(
        radius=lgf.radius,
        temperature=lgf.temperature,
        divergence=lgf.divergence,
        pairs=lgf.pairs,
        directions=lgf.directions,
        foreground_weight=lgf.foreground_weight,
        kernel=lgf.kernel,
    )


def _token_relation(config: TrainConfig) -> Objective:
    return TokenRelation(margin=config.token_relation.margin, pool=config.token_relation.pool)


_MAKERS: dict[ObjectiveName, Callable[[TrainConfig], Objective]] = {
    "lgf": _lgf,
    "repa": lambda config: Repa(),
    "token-relation": _token_relation,
    "mask": lambda config: MaskSupervision(),
}


def _settings(config: TrainConfig, name: ObjectiveName) -> AuxiliaryConfig:
    settings: AuxiliaryConfig = getattr(config, name.replace("-", "_"))
    return settings
