"""Forward pass and losses of one micro-batch, and loss means over micro-batches and ranks.

Sums are float64 and added in a fixed order, so identical runs log identical values.

Legend: B clip, F latent frame, C channel, H W latent or token grid, L text token, D width, S
timestep of the schedule or timestep bin, T feature map of an objective, J token in time, V value of
a clip (1 for the count, diffusion, each objective).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stages.local_gram_flow import time_weights
from stages.students.student import StudentConfigs
from stages.train_student.data.dataset import Batch
from stages.train_student.logging.rows import TIMESTEP_BINS, LossRow, SkippedClip
from stages.train_student.model.teacher import Teacher, TeacherLayout
from stages.train_student.objectives.objective import Objective
from stages.train_student.parallel.process_group import World, gather


@dataclass(frozen=True, slots=True)
class Losses:
    """Total loss, and the unweighted losses of each clip; on the device."""

    total: Tensor
    """Scalar, with gradient."""
    diffusion_B: Tensor
    auxiliary_B: dict[str, Tensor]
    """Objective name -> loss of each clip."""


class StudentInputs(NamedTuple):
    """Arguments of `Student.forward`, in its order."""

    transformer: dict[str, Any]
    """Keyword arguments of the transformer."""
    token_grid: tuple[int, int, int]
    time_weights: dict[str, Tensor | None]


@dataclass(frozen=True, slots=True)
class _Shape:
    """Inputs of the student that depend only on the shape of a batch."""

    token_grid: tuple[int, int, int]
    transformer: dict[str, Any]
    time_weights: dict[str, Tensor | None]


class TrainingStep:
    """Forward pass and losses; holds what stays constant over the run."""

    def __init__(
        self,
        configs: StudentConfigs,
        objectives: tuple[Objective[Any], ...],
        *,
        layout: TeacherLayout | None = None,
        visual_layout: TeacherLayout | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Compute the noise schedule; inputs that depend on batch shape are cached on first use.

        Args:
            objectives: the auxiliary losses; empty for plain fine-tuning.
            layout: layout of the stored features; None if they are on the student's token grid.
            visual_layout: the same of the visual store.
            device: device of the batches; meta works.
            dtype: dtype the transformer computes in; losses are float32.
        """
        self._configs = configs
        self._objectives = objectives
        self._layout = layout or TeacherLayout()
        self._visual_layout = visual_layout or TeacherLayout(visual=True)
        self._device = device
        self._dtype = dtype
        self._schedule = configs.schedule(device)
        self._shapes: dict[tuple[int | None, ...], _Shape] = {}

    def __call__(self, student: Any, batch: Batch, step: int) -> Losses:
        """Compute the losses of a batch that is already on the device.

        Args:
            student: a `Student`, or the engine that wraps one.
            step: index of the optimiser step, from 0; objective weights may depend on it.

        Returns:
            total = mean of the diffusion losses of the clips + sum over objectives of (weight at
            this step * mean of the clips' losses, each weighted by its timestep).
        """
        output, features = student(*self.inputs(batch))
        diffusion_B = self._schedule.diffusion_loss(
            self._configs.prediction(output),
            batch.clean_BFCHW,
            batch.noise_BFCHW,
            batch.timestep_B,
        )
        signal_B = self.signal(batch)
        total = diffusion_B.mean()
        auxiliary_B: dict[str, Tensor] = {}
        teachers = self._teachers(batch)
        for objective in self._objectives:
            loss_B = objective(features[objective.name], teachers[objective.settings.reads_visual])
            counted_B = objective.weights_of(batch.timestep_B, signal_B) * loss_B
            total = total + objective.weight_at(step) * counted_B.mean()
            auxiliary_B[objective.name] = loss_B.detach()
        return Losses(total, diffusion_B.detach(), auxiliary_B)

    def signal(self, batch: Batch) -> Tensor:
        """Share of the signal in the noisy latents: [B], float32."""
        return self._schedule.signal(batch.timestep_B)

    def inputs(self, batch: Batch) -> StudentInputs:
        """Add the noise, and complete the arguments of the student's forward pass."""
        shape = self._shape(batch)
        latents_BFCHW = self._schedule.noisy_latents(
            batch.clean_BFCHW, batch.noise_BFCHW, batch.timestep_B
        )
        if batch.image_BFCHW is not None:
            latents_BFCHW = torch.cat([latents_BFCHW, batch.image_BFCHW], dim=2)
        inputs = self._configs.transformer_inputs(
            latents_BFCHW.to(self._dtype),
            batch.text_BLD.to(self._dtype),
            self._schedule.model_timestep(batch.timestep_B),
            None if batch.image_BLD is None else batch.image_BLD.to(self._dtype),
        )
        # Copies: the engine may modify its arguments.
        return StudentInputs(
            transformer=shape.transformer | inputs,
            token_grid=shape.token_grid,
            time_weights=dict(shape.time_weights),
        )

    def describe_teacher(self, batch: Batch) -> list[str]:
        """What the objectives have to say of the teacher of the first batch, on the device."""
        teachers = self._teachers(batch)
        described = (
            objective.describe_teacher(teachers[objective.settings.reads_visual])
            for objective in self._objectives
        )
        return [text for text in described if text is not None]

    def _teachers(self, batch: Batch) -> dict[bool, Teacher]:
        """The teachers of a batch, by whether an objective reads the visual store."""
        teachers = {False: self.teacher(batch)}
        if batch.visual is not None:
            arrays = dict(batch.visual)
            valid_BT = arrays.pop("valid") != 0
            teachers[True] = replace(
                teachers[False], arrays=arrays, valid_BT=valid_BT, layout=self._visual_layout
            )
        return teachers

    def teacher(self, batch: Batch) -> Teacher:
        """SAM2's teacher of a batch."""
        return Teacher(
            arrays=batch.teacher,
            valid_BT=batch.teacher_valid_BT,
            masks=batch.masks,
            num_frames=batch.num_frames,
            token_grid=self._shape(batch).token_grid[1:],
            layout=self._layout,
        )

    def _shape(self, batch: Batch) -> _Shape:
        _, padded, _, height, width = batch.clean_BFCHW.shape
        maps = None if batch.teacher_valid_BT is None else batch.teacher_valid_BT.shape[1]
        visual_maps = None if batch.visual is None else batch.visual["valid"].shape[1]
        size = (padded, height, width, batch.num_frames, maps, visual_maps)
        if size not in self._shapes:
            configs = self._configs
            weights: dict[str, Tensor | None] = {}
            for objective in self._objectives:
                visual = objective.settings.reads_visual
                num_maps = objective.num_maps(visual_maps if visual else maps, batch.num_frames)
                weights_TJ = time_weights(
                    num_maps,
                    batch.num_frames,
                    patch_size_t=configs.patch_size_t,
                    frames_per_map=self._visual_layout.frames_per_map if visual else None,
                )
                weights[objective.name] = (
                    None if weights_TJ is None else weights_TJ.to(self._device)
                )
            self._shapes[size] = _Shape(
                token_grid=configs.token_grid(padded, height, width),
                transformer=configs.shape_inputs(padded, height, width, self._device),
                time_weights=weights,
            )
        return self._shapes[size]


_TOTAL, _PASSES, _DAMAGED, _FIRST_BIN = 0, 1, 2, 3


class StepTotals:
    """Accumulates losses over the micro-batches of this rank, then over all ranks."""

    def __init__(self, objectives: tuple[str, ...], timesteps: int, device: torch.device) -> None:
        """Start from zero.

        Args:
            objectives: names of the auxiliary losses.
            timesteps: number of timesteps of the schedule.
        """
        self._objectives = objectives
        self._timesteps = timesteps
        self._device = device
        self._passes: list[tuple[tuple[str, ...], Tensor, Tensor]] = []
        """Keys, timestep_B and values_BV of each micro-batch."""
        size = _FIRST_BIN + TIMESTEP_BINS * (2 + len(objectives))
        self._sums = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, keys: tuple[str, ...], timestep_B: Tensor, losses: Losses, damaged: int) -> None:
        """Add a micro-batch, without synchronising with the device.

        Args:
            keys: keys of its clips.
            damaged: number of clips that could not be read and were replaced.
        """
        auxiliary = [losses.auxiliary_B[name] for name in self._objectives]
        columns = [torch.ones_like(losses.diffusion_B), losses.diffusion_B, *auxiliary]
        values_BV = torch.stack(columns, dim=1).double()
        bin_B = timestep_B * TIMESTEP_BINS // self._timesteps
        bins_S = torch.arange(TIMESTEP_BINS, device=self._device)
        # A matrix product, since index_add_ is not deterministic on a GPU.
        sums_SV = (bins_S[:, None] == bin_B).double() @ values_BV
        self._sums[_TOTAL] += losses.total.detach()
        self._sums[_PASSES] += 1
        self._sums[_DAMAGED] += damaged
        self._sums[_FIRST_BIN:] += sums_SV.flatten()
        self._passes.append((keys, timestep_B, values_BV))

    def over_ranks(self, world: World) -> "StepMeans":
        """Sum over the ranks; synchronises with the device."""
        if world.size > 1:
            dist.all_reduce(self._sums)
        return StepMeans(self._sums.tolist(), self._objectives)

    def clips(self, world: World) -> tuple[SkippedClip, ...]:
        """Every clip of the step with its losses, from all ranks; every rank must call this."""
        mine = [
            SkippedClip(
                key=key,
                timestep=timestep,
                diffusion=_as_json(diffusion),
                auxiliary=dict(zip(self._objectives, map(_as_json, auxiliary), strict=True)),
            )
            for keys, timestep_B, values_BV in self._passes
            for key, timestep, (_, diffusion, *auxiliary) in zip(
                keys, timestep_B.tolist(), values_BV.tolist(), strict=True
            )
        ]
        return tuple(clip for rank in gather(world, mine) for clip in rank)


class StepMeans:
    """Means of a step's losses over the whole batch."""

    def __init__(self, sums: list[float], objectives: tuple[str, ...]) -> None:
        self._objectives = objectives
        self._values = 2 + len(objectives)
        self._bins = [
            sums[start : start + self._values]
            for start in range(_FIRST_BIN, len(sums), self._values)
        ]
        self.finite = all(map(math.isfinite, sums))
        """Whether every loss of every clip is finite."""
        self.loss = sums[_TOTAL] / sums[_PASSES]
        self.damaged = round(sums[_DAMAGED])
        """Number of clips that the ranks could not read."""

    def row(self, step: int, grad_norm: float, learning_rate: float) -> LossRow:
        """The log row of the step; requires `finite`."""
        clips, *sums = (math.fsum(column) for column in zip(*self._bins, strict=True))
        means = [value / clips for value in sums]
        counts = [round(values[0]) for values in self._bins]
        by_timestep: dict[str, list[Any]] = {"count": counts}
        for column, name in enumerate(("diffusion", *self._objectives), 1):
            by_timestep[name] = [
                values[column] / count if count else None
                for values, count in zip(self._bins, counts, strict=True)
            ]
        return LossRow(
            step=step,
            loss=self.loss,
            diffusion=means[0],
            auxiliary=dict(zip(self._objectives, means[1:], strict=True)),
            grad_norm=grad_norm,
            lr=learning_rate,
            by_timestep=by_timestep,
        )


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
