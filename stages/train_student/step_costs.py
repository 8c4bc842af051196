"""FLOPs and activation memory of a training step, from tensor shapes only.

The student is built from its configuration on torch's meta device, and the run's own `TrainingStep`
runs forward and backward under a `FlopCounter`: no weights are needed and nothing is computed.

Legend: B clip, F latent frame, C channel, H W latent, L text token, D width, T teacher feature map.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from cache_schema import StoreSettings
from stages.clips.config import ClipsConfig
from stages.compute_cost.flop_counter import FlopCounter
from stages.students.registry import with_blocks
from stages.students.student import StudentConfigs
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
"""Depths, in blocks, that are measured; the costs of the real depth are extrapolated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """FLOPs per clip of a step, and memory of one micro-batch."""

    flops_per_clip: float
    """Executed FLOPs of the forward and backward pass, including recomputation by gradient
    checkpointing and fused attention."""
    model_flops_per_clip: float
    """FLOPs without recomputation, be it of blocks or of attention scores; the numerator of MFU."""
    activation_bytes: int
    """Peak memory, excluding weights, weight gradients and the batch."""
    batch_bytes: int
    """Size of one micro-batch on the device."""


def step_cost(
    config: TrainConfig,
    configs: StudentConfigs,
    size: ClipsConfig,
    *,
    teacher: StoreSettings | None = None,
    visual: StoreSettings | None = None,
    masks: StoreSettings | None = None,
) -> StepCost:
    """Compute the cost of a step on clips of one size. Takes a few seconds for official models.

    Two transformers of a few blocks run the step; FLOPs and memory are extrapolated linearly to the
    full depth.

    Args:
        config: the objectives, adapters, micro-batch size and dtype of the weights.
        configs: the base model's configuration.
        size: clip size; its buckets are ignored.
        teacher: settings of the store named by `config.teacher_form`, for clips of this size; None
            if no auxiliary loss needs it.
        visual: settings of the visual store; None if no objective needs it.
        masks: settings of the masks store; None if no objective needs masks.

    Raises:
        ValueError: the settings do not fit the model.
    """
    blocks = configs.num_blocks
    short, longer = min(_SHORT, blocks), min(_LONGER, blocks)
    plain = config.model_copy(update={"objectives": ()})
    no_checkpointing = plain.model_copy(update={"gradient_checkpointing": False})
    batch = meta_batch(config, configs, size, teacher, masks, visual)

    def run(variant: TrainConfig, num_blocks: int) -> FlopCounter:
        return _run(variant, configs, num_blocks, batch, teacher, visual)

    few, more = run(plain, short), run(plain, longer)
    with_objectives = run(config, short) if config.objectives else few
    recomputed = 0
    if config.gradient_checkpointing:
        recomputed = few.flops - run(no_checkpointing, short).flops
    slope = (blocks - short) / max(longer - short, 1)

    def at_full_depth(base: int, at_short: int, at_longer: int) -> float:
        return base + slope * (at_longer - at_short)

    flops = at_full_depth(with_objectives.flops, few.flops, more.flops)
    recomputed_scores = blocks / short * few.recomputed_flops
    peak = at_full_depth(with_objectives.peak_bytes, few.peak_bytes, more.peak_bytes)
    clips = config.micro_batch_size
    return StepCost(
        flops_per_clip=flops / clips,
        model_flops_per_clip=(flops - blocks / short * recomputed - recomputed_scores) / clips,
        activation_bytes=round(peak),
        batch_bytes=batch_bytes(batch),
    )


def meta_student(
    config: TrainConfig,
    configs: StudentConfigs,
    teacher: StoreSettings | None = None,
    visual: StoreSettings | None = None,
) -> Student:
    """Build the student as a run would train it, on the meta device.

    Args:
        teacher: settings of the store that the run would read; gives the width of features.
        visual: the same of the visual store.
    """
    dtype = weights_dtype(config.deepspeed)
    with _META:
        model_class = configs.model_class("transformer")
        transformer = model_class.from_config(dict(configs.transformer))
        transformer.train()
        if config.method == "lora":
            add_adapters(transformer, config.lora)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        heads = None
        if config.objectives:
            frame_rate = teacher is None or teacher.values.get("time_rate", "frame") == "frame"
            heads = build_heads(config, configs, teacher, frame_rate=frame_rate, visual=visual)
    # Not diffusers' own `to`, which warns about float32 modules that this model does not have.
    nn.Module.to(transformer, dtype)
    return Student(transformer, None if heads is None else heads.to(dtype), config.block)


def _run(
    config: TrainConfig,
    configs: StudentConfigs,
    num_blocks: int,
    batch: Batch,
    teacher: StoreSettings | None,
    visual: StoreSettings | None = None,
) -> FlopCounter:
    """Count one micro-batch, forward and backward, through `num_blocks` blocks."""
    shallow = with_blocks(configs, num_blocks)
    # If blocks follow the taught one, the objectives' graph is alive during their backward pass.
    last = config.block >= configs.num_blocks - 1
    taught = num_blocks - 1 if last else 0
    student = meta_student(config.model_copy(update={"block": taught}), shallow, teacher, visual)
    step = TrainingStep(
        configs,
        build_objectives(config),
        layout=TeacherLayout.of(teacher),
        visual_layout=None if visual is None else TeacherLayout.of(visual),
        device=_META,
        dtype=weights_dtype(config.deepspeed),
    )
    # Drop each gradient at once: where gradients are kept depends on the ZeRO stage.
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in student.parameters()
        if parameter.requires_grad
    ]
    with FlopCounter(training=True) as meter:
        losses = step(student, batch, 0)
        losses.total.backward()
    for hook in hooks:
        hook.remove()
    return meter


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def meta_batch(
    config: TrainConfig,
    configs: StudentConfigs,
    size: ClipsConfig,
    teacher: StoreSettings | None,
    masks: StoreSettings | None,
    visual: StoreSettings | None = None,
) -> Batch:
    """A micro-batch of the shapes that a run would have, on the meta device."""
    clips = config.micro_batch_size
    frames = size.num_latent_frames + configs.padding(size.num_latent_frames)
    latents_BFCHW = torch.empty(
        clips, frames, configs.latent_channels, *size.latent_size, device=_META
    )
    arrays = None if teacher is None else _store_batch(teacher, clips)
    return Batch(
        keys=("",) * clips,
        clean_BFCHW=latents_BFCHW,
        noise_BFCHW=torch.empty_like(latents_BFCHW),
        timestep_B=torch.empty(clips, dtype=torch.int64, device=_META),
        text_BLD=torch.empty(clips, *configs.text_shape, dtype=torch.float16, device=_META),
        image_BFCHW=_meta_condition(configs, latents_BFCHW),
        image_BLD=_meta_image_states(configs, clips),
        teacher=arrays,
        teacher_valid_BT=None if arrays is None else arrays.pop("valid") != 0,
        masks=None if masks is None else _store_batch(masks, clips),
        visual=None if visual is None else _store_batch(visual, clips),
        num_frames=size.num_frames,
    )


def _meta_condition(configs: StudentConfigs, latents_BFCHW: Tensor) -> Tensor | None:
    if not configs.condition_channels:
        return None
    clips, frames, _, *size = latents_BFCHW.shape
    return torch.empty(clips, frames, configs.condition_channels, *size, device=_META)


def _meta_image_states(configs: StudentConfigs, clips: int) -> Tensor | None:
    if configs.image_embeds_shape is None:
        return None
    shape = configs.image_embeds_shape
    return torch.empty(clips, *shape, dtype=torch.float16, device=_META)


def _store_batch(settings: StoreSettings, clips: int) -> dict[str, Tensor]:
    """Empty meta tensors of a batch of a store's arrays."""
    return {
        name: torch.empty(clips, *spec.shape, dtype=getattr(torch, spec.dtype), device=_META)
        for name, spec in settings.arrays.items()
    }


def batch_bytes(batch: Batch) -> int:
    """Size of a batch's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(batch))


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += value.values()
    return found
