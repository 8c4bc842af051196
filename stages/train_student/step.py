"""One forward pass of training: a batch in, losses out; the training loop uses it.

Legend: B clip, F latent frame, C channel, H W latent or token grid, S timestep of the schedule,
T map of the teacher.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.base_facts import BaseFacts
from stages.train_student.data.dataset import Batch
from stages.train_student.diffusion import cumulative_alphas, diffusion_loss, noisy_latents
from stages.train_student.model_inputs import rotary_positions
from stages.train_student.objectives import Objective
from stages.train_student.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars on the device: what is minimised and its parts before weighting."""

    total: Tensor
    diffusion: Tensor
    auxiliary: Tensor | None


class TrainingStep:
    """Everything about a forward pass that stays the same over the run."""

    def __init__(
        self,
        facts: BaseFacts,
        latent_shape: tuple[int, int, int],
        objective: Objective | None,
        weight: float,
        *,
        native_parts: int | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Prepare the schedule and the positions.

        Args:
            latent_shape: latent frames (without padding), height and width of every clip.
            objective: the auxiliary loss, or None.
            weight: its share: total = diffusion + weight * auxiliary.
            native_parts: of the teacher's channels, where its features lie on SAM2's own grid;
                None where they lie on the student's.
            dtype: format the transformer computes in; losses are float32.
        """
        frames, height, width = latent_shape
        self._objective = objective
        self._weight = weight
        self._native_parts = native_parts
        self._dtype = dtype
        self._abar_S = cumulative_alphas(facts.scheduler).float().to(device)
        self._token_grid = facts.token_grid(frames, height, width)
        self._rotary = rotary_positions(
            facts, frames + facts.padding(frames), height, width, device
        )
        self._ofs = None if facts.ofs is None else torch.tensor([facts.ofs], device=device)

    def __call__(self, student: Any, batch: Batch) -> Losses:
        """Losses of a batch that lies on the device.

        Args:
            student: a `Student`, or the engine around one.
        """
        abar_B = self._abar_S[batch.timestep_B]
        latents_BFCHW = noisy_latents(batch.clean_BFCHW, batch.noise_BFCHW, abar_B)
        if batch.image_BFCHW is not None:
            latents_BFCHW = torch.cat([latents_BFCHW, batch.image_BFCHW], dim=2)
        velocity_BFCHW, features_BTHWC = student(
            latents_BFCHW.to(self._dtype),
            batch.text_BLD.to(self._dtype),
            batch.timestep_B,
            self._token_grid,
            self._rotary,
            self._ofs,
        )
        diffusion = diffusion_loss(velocity_BFCHW, batch.clean_BFCHW, batch.noise_BFCHW, abar_B)
        if self._objective is None:
            return Losses(diffusion, diffusion.detach(), None)
        auxiliary = self._objective(features_BTHWC, self._teacher(batch))
        total = diffusion + self._weight * auxiliary
        return Losses(total, diffusion.detach(), auxiliary.detach())

    def _teacher(self, batch: Batch) -> Teacher:
        assert batch.teacher is not None, "an objective needs a teacher"
        assert batch.teacher_valid_BT is not None, "a teacher says which maps are valid"
        return Teacher(
            arrays=batch.teacher,
            valid_BT=batch.teacher_valid_BT,
            token_grid=self._token_grid[1:],
            native_parts=self._native_parts,
        )
