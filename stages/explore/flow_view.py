"""The Gram flow of one clip, token by token, by the loss's own functions."""

# Legend: M map of a store (frame or latent frame), P pair of maps, H W token grid, K neighbour,
# B clip.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from stages.local_gram_flow import (
    flow_entropy,
    flow_probability,
    implied_flow,
    implied_motion,
    neighbour_mask,
    radius_of_window,
)
from stages.train_student.model.teacher import PairDirection


class NoSuchToken(ValueError):  # noqa: N818 (named after the condition)
    """A direction, pair, row or column that a Gram flow does not have."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FlowView:
    """Similarities of a clip, of the teacher or of a student."""

    by_direction: Mapping[PairDirection, Tensor]
    """Similarities [P, H, W, K] on the host; `forward`: of a pair's first map to windows in its
    second; `backward`: of the second to windows in the first."""
    moments: tuple[int, ...]
    """The clip's frame of each map."""
    valid_M: np.ndarray
    """bool, maps that training uses."""

    @property
    def shape(self) -> tuple[int, ...]:
        """P, H, W and K."""
        return tuple(next(iter(self.by_direction.values())).shape)

    def window(
        self, direction: str, pair: int, y: int, x: int, temperature: float
    ) -> dict[str, Any]:
        """The Gram flow of one token.

        Args:
            direction: Of the pair.
            pair: Number of the pair.
            y: Row of the token; so is `x` its column.
            temperature: Of the softmax.

        Returns:
            similarity and probability of the K neighbours, null outside the grid; the radius; the
            expected offset (dx, dy) in tokens; the entropy relative to a uniform choice; whether
            training uses the pair.

        Raises:
            NoSuchToken: The flow has no such direction, pair or token.
        """
        flow_PHWK = self._flow(direction)
        num_pairs, height, width, neighbours = flow_PHWK.shape
        if not (0 <= pair < num_pairs and 0 <= y < height and 0 <= x < width):
            raise NoSuchToken(
                f"no token ({y}, {x}) of pair {pair}: there are {num_pairs} pairs of {height}x"
                f"{width} tokens"
            )
        pair_BPHWK = flow_PHWK[None, pair : pair + 1]
        radius = radius_of_window(neighbours)
        inside_K = neighbour_mask(height, width, radius)[y, x].tolist()
        probability_K = flow_probability(pair_BPHWK, temperature)[0, 0, y, x].tolist()
        similarity_K = pair_BPHWK[0, 0, y, x].tolist()
        return {
            "radius": radius,
            "similarity": _inside(similarity_K, inside_K),
            "probability": _inside(probability_K, inside_K),
            "offset": implied_flow(pair_BPHWK, temperature)[0, 0, y, x].tolist(),
            "entropy": float(flow_entropy(pair_BPHWK, temperature)[0, 0, y, x]),
            "valid": bool(self.valid_M[pair] and self.valid_M[pair + 1]),
        }

    def motion(self, direction: str, temperature: float) -> np.ndarray:
        """The motion that the Gram flow implies: float32 [P, H, W, 2], (dx, dy) in tokens.

        Raises `NoSuchToken` for a direction that the flow does not have.
        """
        flow_PHWK = self._flow(direction)
        motion_PHW2: np.ndarray = implied_motion(flow_PHWK[None], temperature)[0].numpy()
        return motion_PHW2

    def _flow(self, direction: str) -> Tensor:
        for name, flow_PHWK in self.by_direction.items():
            if name == direction:
                return flow_PHWK
        raise NoSuchToken(f"no Gram flow {direction[:40]!r} of this clip")


def _inside(values_K: list[float], inside_K: list[bool]) -> list[float | None]:
    return [value if inside else None for value, inside in zip(values_K, inside_K, strict=True)]
