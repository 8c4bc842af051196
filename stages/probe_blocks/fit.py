"""The linear map of one block: fitted on some clips, measured on others.

The map is training's projector without its hidden layers, followed by the same interpolation in
time, and its loss is training's Local Gram Flow objective. The loss compares normalised tokens, so
there is no closed form; the map is fitted by Adam from the same initial weights at every block, on
the same clips, noise and timesteps in the same order.

Legend: B clip (always 1), T map of the teacher, H W token grid, C channel, N token, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.probe_blocks.blockwise import BlockwiseTransformer, TokenState
from stages.probe_blocks.config import ProbeConfig
from stages.train_student.data.dataset import Batch
from stages.train_student.objectives.lgf import LocalGramFlow
from stages.train_student.step import TrainingStep


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeItem:
    """One clip at one timestep; the same for every block."""

    key: str
    batch: Batch
    """On the host."""
    state: TokenState
    """Its tokens are replaced by each block's output."""


class LinearProbe:
    """Fits and measures linear maps of tokens with training's own step and objective."""

    def __init__(
        self,
        config: ProbeConfig,
        objective: LocalGramFlow,
        training_step: TrainingStep,
        *,
        heads: Callable[[], nn.ModuleDict],
        seed: int,
        device: torch.device,
    ) -> None:
        """Store the arguments.

        Args:
            heads: builds the objective's projector, by its name.
            seed: seed of the projector's initial weights and of the order of items.
        """
        self._config = config
        self._objective = objective
        self._training_step = training_step
        self._heads = heads
        self._seed = seed
        self._device = device

    @property
    def steps(self) -> int:
        """Steps of each fit."""
        return self._config.fit_steps

    def embed(self, transformer: BlockwiseTransformer, batch: Batch) -> TokenState:
        """The tokens that the first block receives of a batch, as in training."""
        return transformer.embed(self._training_step.inputs(batch.to(self._device)))

    def fit(
        self, items: Sequence[ProbeItem], advance: Callable[[], None]
    ) -> tuple[nn.Module, float]:
        """Fit a new map to the items' current tokens.

        Args:
            advance: called after each step.

        Returns:
            The map, and the mean loss of the last quarter of the steps; NaN if one is not finite.
        """
        config = self._config
        torch.manual_seed(self._seed)
        head = self._heads()[self._objective.name].to(self._device)
        optimizer = torch.optim.Adam(head.parameters(), lr=config.fit_learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.fit_steps)
        order = torch.Generator().manual_seed(self._seed)
        losses: list[float] = []
        while len(losses) < config.fit_steps:
            for number in torch.randperm(len(items), generator=order).tolist():
                batch = items[number].batch.to(self._device)
                loss_B = self.loss(head, items[number], batch)
                weight_B = self._objective.weights_of(
                    batch.timestep_B, self._training_step.signal(batch)
                )
                optimizer.zero_grad()
                (weight_B * loss_B).mean().backward()
                optimizer.step()
                decay.step()
                losses.append(float(loss_B.detach()))
                advance()
                if len(losses) == config.fit_steps:
                    break
        last = losses[-max(1, config.fit_steps // 4) :]
        mean = math.fsum(last) / len(last) if all(map(math.isfinite, last)) else math.nan
        return head, mean

    @torch.no_grad()
    def measure(self, head: nn.Module, item: ProbeItem) -> float:
        """Loss of a fitted map, in nats; NaN if it is not finite."""
        loss = float(self.loss(head, item, item.batch.to(self._device)))
        return loss if math.isfinite(loss) else math.nan

    @torch.no_grad()
    def uniform_loss(self, batch: Batch) -> float:
        """Loss of a uniform Gram flow: equal tokens say nothing about where structure moves."""
        teacher = self._training_step.teacher(batch.to(self._device))
        assert teacher.valid_BT is not None, "the objective reads a teacher"
        shape = (*teacher.valid_BT.shape, *teacher.token_grid, 1)
        return float(self._objective(torch.ones(shape, device=self._device), teacher))

    def loss(self, head: nn.Module, item: ProbeItem, batch: Batch) -> Tensor:
        """Loss of a map of an item's current tokens: [B]; `batch` is the item's, on the device."""
        tokens_BND = item.state.tokens_BND.to(self._device).float()
        inputs = self._training_step.inputs(batch)
        features_BTHWC = head(
            tokens_BND.unflatten(1, inputs.token_grid),
            inputs.time_weights[self._objective.name],
        )
        loss_B: Tensor = self._objective(features_BTHWC, self._training_step.teacher(batch))
        return loss_B
