"""What one clip costs a training step: operations and live bytes, from shapes alone.

The student is built from its configuration on torch's meta device and goes through the run's own
`TrainingStep`, forward and backward, under a `Meter`: no weight is needed and nothing is computed.
`memory` and `estimate` ask, and the run itself, for its share of the peak rate.

Legend: B clip, F latent frame, C channel, H W latent, L text token, D width, T map of the teacher.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from cache_schema import ArraySpec, StoreReader, StoreSettings
from stages.clips.config import ClipsConfig
from stages.cogvideox.configs import BaseFacts
from stages.compute_cost.flop_counter import Meter
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch
from stages.train_student.model.lora import add_adapters
from stages.train_student.model.student import Student
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import build_heads, build_objectives
from stages.train_student.parallel.deepspeed import weights_dtype
from stages.train_student.step import TrainingStep

_META = torch.device("meta")
_SHORT, _LONGER = 2, 4
"""Blocks of the transformers that stand in for a deep one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """One clip's share of a step, and what one micro-batch keeps in memory meanwhile."""

    flops_per_clip: float
    """Of the forward and backward pass as they are done: what gradient checkpointing and fused
    attention make again counts again."""
    model_flops_per_clip: float
    """Without what is run again, attention's scores included: what a share of the peak rate is
    reckoned by."""
    activation_bytes: int
    """The most that is alive beside weights, gradients of weights and the batch itself."""
    batch_bytes: int
    """Of one micro-batch on the device."""


def step_cost(
    config: TrainConfig,
    facts: BaseFacts,
    size: ClipsConfig,
    *,
    teacher: StoreSettings | None = None,
    masks: StoreSettings | None = None,
) -> StepCost:
    """Reckon a step on clips of one size. Takes some seconds for the official models.

    A transformer of a few blocks goes through the step; every further block costs what the last of
    them did, in operations and in what it keeps.

    Args:
        config: the objectives, adapters, micro-batch and format of the weights.
        facts: the base model's configuration.
        size: of the clips; its buckets are not looked at.
        teacher: of the store that `config.teacher_form` names, for clips of this size; None without
            an auxiliary loss that needs it.
        masks: of the masks store; None where no objective needs masks.

    Raises:
        ValueError: the settings do not fit the model.
    """
    blocks = int(facts.transformer["num_layers"])
    short, longer = min(_SHORT, blocks), min(_LONGER, blocks)
    plain = config.model_copy(update={"objectives": ()})
    without = plain.model_copy(update={"gradient_checkpointing": False})
    batch = _meta_batch(config, facts, size, teacher, masks)

    def run(of: TrainConfig, num_blocks: int) -> Meter:
        return _run(of, facts, num_blocks, batch, teacher)

    few, more = run(plain, short), run(plain, longer)
    whole = run(config, short) if config.objectives else few
    again = few.flops - run(without, short).flops if config.gradient_checkpointing else 0
    further = (blocks - short) / max(longer - short, 1)

    def at_full_depth(of_short: int, of_few: int, of_more: int) -> float:
        return of_short + further * (of_more - of_few)

    flops = at_full_depth(whole.flops, few.flops, more.flops)
    scores = blocks / short * few.scores_again_flops
    peak = at_full_depth(whole.peak_bytes, few.peak_bytes, more.peak_bytes)
    clips = config.micro_batch_size
    return StepCost(
        flops_per_clip=flops / clips,
        model_flops_per_clip=(flops - blocks / short * again - scores) / clips,
        activation_bytes=round(peak),
        batch_bytes=sum(t.numel() * t.element_size() for t in _tensors(batch)),
    )


def meta_student(
    config: TrainConfig, facts: BaseFacts, teacher: StoreSettings | None = None
) -> Student:
    """The student as a run would train it, on the meta device.

    Args:
        teacher: of the store that the run would read; tells the width of features.
    """
    dtype = weights_dtype(config.deepspeed)
    with _META:
        transformer = CogVideoXTransformer3DModel.from_config(dict(facts.transformer)).train()
        if config.method == "lora":
            add_adapters(transformer, config.lora)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        heads = _heads(config, facts, teacher) if config.objectives else None
    # Not diffusers' own `to`, which warns of modules to keep in float32 that are none.
    nn.Module.to(transformer, dtype)
    return Student(transformer, None if heads is None else heads.to(dtype), config.block)


def _run(
    config: TrainConfig,
    facts: BaseFacts,
    num_blocks: int,
    batch: Batch,
    teacher: StoreSettings | None,
) -> Meter:
    """Of one micro-batch, forward and backward, through so many blocks."""
    shallow = replace(facts, transformer=facts.transformer | {"num_layers": num_blocks})
    # Where blocks follow the taught one, their backward pass finds the objectives' graph alive.
    last = config.block >= facts.transformer["num_layers"] - 1
    taught = num_blocks - 1 if last else 0
    student = meta_student(config.model_copy(update={"block": taught}), shallow, teacher)
    step = TrainingStep(
        facts,
        build_objectives(config),
        layout=TeacherLayout.of(None if teacher is None else cast(StoreReader, _Store(teacher))),
        device=_META,
        dtype=weights_dtype(config.deepspeed),
    )
    # Each gradient goes as it comes: where it stays is a matter of the ZeRO stage.
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in student.parameters()
        if parameter.requires_grad
    ]
    with Meter(training=True) as meter:
        losses = step(student, batch, 0)
        losses.total.backward()
    for hook in hooks:
        hook.remove()
    return meter


@dataclass(frozen=True, slots=True)
class _Store:
    """A store that may not be there yet: what the layout asks of one."""

    settings: StoreSettings


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _meta_batch(
    config: TrainConfig,
    facts: BaseFacts,
    size: ClipsConfig,
    teacher: StoreSettings | None,
    masks: StoreSettings | None,
) -> Batch:
    clips = config.micro_batch_size
    frames = size.num_latent_frames + facts.padding(size.num_latent_frames)
    latents_BFCHW = torch.empty(
        clips, frames, facts.latent_channels, *size.latent_size, device=_META
    )
    text = facts.transformer["max_text_seq_length"], facts.transformer["text_embed_dim"]
    arrays = None if teacher is None else _stored(teacher, clips)
    return Batch(
        keys=("",) * clips,
        clean_BFCHW=latents_BFCHW,
        noise_BFCHW=torch.empty_like(latents_BFCHW),
        timestep_B=torch.empty(clips, dtype=torch.int64, device=_META),
        text_BLD=torch.empty(clips, *text, dtype=torch.float16, device=_META),
        image_BFCHW=torch.empty_like(latents_BFCHW) if facts.image_to_video else None,
        teacher=arrays,
        teacher_valid_BT=None if arrays is None else arrays.pop("valid") != 0,
        masks=None if masks is None else _stored(masks, clips),
        num_frames=size.num_frames,
    )


def _stored(settings: StoreSettings, clips: int) -> dict[str, Tensor]:
    """A batch of a store's arrays."""
    return {name: _empty(spec, clips) for name, spec in settings.arrays.items()}


def _empty(spec: ArraySpec, clips: int) -> Tensor:
    return torch.empty(clips, *spec.shape, dtype=getattr(torch, spec.dtype), device=_META)


def _tensors(batch: Batch) -> list[Tensor]:
    return [
        tensor for name in batch.__dataclass_fields__ for tensor in _leaves(getattr(batch, name))
    ]


def _leaves(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return list(value.values()) if isinstance(value, dict) else []


def _heads(config: TrainConfig, facts: BaseFacts, teacher: StoreSettings | None) -> nn.ModuleDict:
    """As the run makes them: the teacher's width and rate decide about their shapes."""
    channels, frame_rate = None, True
    if teacher is not None:
        frame_rate = teacher.values.get("time_rate", "frame") == "frame"
        if "features" in teacher.arrays:
            channels = teacher.arrays["features"].shape[-1]
    width = facts.transformer["num_attention_heads"] * facts.transformer["attention_head_dim"]
    return build_heads(
        config, width, channels, frame_rate=frame_rate, patch_size_t=facts.patch_size_t
    )
