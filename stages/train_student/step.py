"""One forward pass of training: a batch in, losses out; the loop and the validation use it.

Legend: B clip, F latent frame, C channel, H W latent or token grid, S timestep of the schedule,
T map of an objective, J token in time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.base_facts import BaseFacts
from stages.local_gram_flow import time_weights
from stages.train_student.data.dataset import Batch
from stages.train_student.diffusion import cumulative_alphas, diffusion_loss, noisy_latents
from stages.train_student.model_inputs import rotary_positions
from stages.train_student.objectives.weighting import WeightedObjective
from stages.train_student.teacher import Teacher, TeacherLayout


@dataclass(frozen=True, slots=True)
class Losses:
    """What is minimised, and its parts for each clip before weighting; on the device."""

    total: Tensor
    """A scalar, with gradient."""
    diffusion_B: Tensor
    auxiliary_B: dict[str, Tensor]
    """By objective."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What of the student's inputs depends on the size of a batch alone."""

    token_grid: tuple[int, int, int]
    rotary: tuple[Tensor, Tensor] | None
    time_weights: dict[str, Tensor | None]


class TrainingStep:
    """Everything about a forward pass that stays the same over the run."""

    def __init__(
        self,
        facts: BaseFacts,
        objectives: tuple[WeightedObjective, ...],
        *,
        layout: TeacherLayout | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Prepare the schedule; what depends on a batch's size is made when one comes.

        Args:
            objectives: the auxiliary losses; empty for plain fine-tuning.
            layout: of the stored features; None for such as lie on the student's grid.
            device: where batches lie; meta works.
            dtype: format the transformer computes in; losses are float32.
        """
        self._facts = facts
        self._objectives = objectives
        self._layout = layout or TeacherLayout()
        self._device = device
        self._dtype = dtype
        self._abar_S = cumulative_alphas(facts.scheduler).float().to(device)
        self._ofs = None if facts.ofs is None else torch.tensor([facts.ofs], device=device)
        self._shapes: dict[tuple[int | None, ...], _Shape] = {}

    def __call__(self, student: Any, batch: Batch, step: int) -> Losses:
        """Losses of a batch that lies on the device.

        Args:
            student: a `Student`, or the engine around one.
            step: number of the optimiser step, from 0; weights of objectives may depend on it.

        Returns:
            total = mean of the clips' diffusion losses + for each objective its weight at this step
            times the mean of the clips' losses, each weighted by the clip's noise.
        """
        shape = self._shape(batch)
        abar_B = self._abar_S[batch.timestep_B]
        latents_BFCHW = noisy_latents(batch.clean_BFCHW, batch.noise_BFCHW, abar_B)
        if batch.image_BFCHW is not None:
            latents_BFCHW = torch.cat([latents_BFCHW, batch.image_BFCHW], dim=2)
        velocity_BFCHW, features = student(
            latents_BFCHW.to(self._dtype),
            batch.text_BLD.to(self._dtype),
            batch.timestep_B,
            shape.token_grid,
            shape.rotary,
            self._ofs,
            dict(shape.time_weights),  # the engine may write into what it is given
        )
        diffusion_B = diffusion_loss(velocity_BFCHW, batch.clean_BFCHW, batch.noise_BFCHW, abar_B)
        total = diffusion_B.mean()
        auxiliary_B: dict[str, Tensor] = {}
        teacher = self._teacher(batch, shape)
        for weighted in self._objectives:
            loss_B = weighted.objective(features[weighted.name], teacher)
            counted_B = weighted.weights_of(batch.timestep_B, abar_B) * loss_B
            total = total + weighted.weight_at(step) * counted_B.mean()
            auxiliary_B[weighted.name] = loss_B.detach()
        return Losses(total, diffusion_B.detach(), auxiliary_B)

    def _shape(self, batch: Batch) -> _Shape:
        _, padded, _, height, width = batch.clean_BFCHW.shape
        maps = None if batch.teacher_valid_BT is None else batch.teacher_valid_BT.shape[1]
        size = (padded, height, width, batch.num_frames, maps)
        if size not in self._shapes:
            facts = self._facts
            weights: dict[str, Tensor | None] = {}
            for weighted in self._objectives:
                num_maps = weighted.objective.num_maps(maps, batch.num_frames)
                weights_TJ = time_weights(
                    num_maps, batch.num_frames, patch_size_t=facts.patch_size_t
                )
                weights[weighted.name] = None if weights_TJ is None else weights_TJ.to(self._device)
            self._shapes[size] = _Shape(
                token_grid=facts.token_grid(padded, height, width),
                rotary=rotary_positions(facts, padded, height, width, self._device),
                time_weights=weights,
            )
        return self._shapes[size]

    def _teacher(self, batch: Batch, shape: _Shape) -> Teacher:
        return Teacher(
            arrays=batch.teacher,
            valid_BT=batch.teacher_valid_BT,
            masks=batch.masks,
            num_frames=batch.num_frames,
            token_grid=shape.token_grid[1:],
            layout=self._layout,
        )
