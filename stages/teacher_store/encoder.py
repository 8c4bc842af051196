"""Computes a clip's Gram-flow entry from its entry in a teacher store.

Extraction and derivation both start from the stored values, so their entries are equal.
"""

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cache_schema import StoreSettings
from stages.local_gram_flow import Directions, part_norms, reverse_pairs, take_directions
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.features import decode_features
from stages.teacher_store.gram_flow import compute_gram_flow, encode_gram_flow, with_back_suffix
from stages.teacher_store.settings import gram_flow_settings, native_parts, stored_forward_weight

_PAIRS_PER_BATCH = 8
"""Pairs of maps on the device at once, so that device memory does not depend on clip length."""


class GramFlowEncoder:
    """Computes the Gram flow of clips of one teacher store.

    Args:
        settings: Settings of the Gram-flow store.
        config: Pairs, window and storage dtype.
        token_grid: Rows and columns of the student's tokens.
        teacher: Settings of the teacher store.
    """

    def __init__(
        self,
        settings: StoreSettings,
        config: GramFlowConfig,
        token_grid: tuple[int, int],
        teacher: StoreSettings,
    ) -> None:
        self.settings = settings
        self._config = config
        self._token_grid = token_grid
        self._native_parts = native_parts(teacher)
        self._teacher = teacher

    @classmethod
    def of(
        cls, teacher: StoreSettings, config: GramFlowConfig, token_grid: tuple[int, int]
    ) -> Self:
        """Build for a teacher store with the settings `teacher`.

        Raises:
            ValueError: See `gram_flow_settings`.
        """
        settings = gram_flow_settings(
            teacher,
            radius=config.radius,
            dtype=config.dtype,
            token_grid=token_grid,
            pairs=config.pairs,
        )
        return cls(settings, config, token_grid, teacher)

    def __call__(
        self, teacher_arrays: Mapping[str, np.ndarray], device: torch.device
    ) -> dict[str, np.ndarray]:
        """Compute a clip's arrays from its arrays in the teacher store.

        Deterministic for the same device and number of threads.
        """
        if self._config.pairs == "crossed":
            arrays = self._flow(teacher_arrays, device, "backward")
            arrays |= with_back_suffix(self._flow(teacher_arrays, device, "forward", reverse=True))
        else:
            arrays = self._flow(teacher_arrays, device, "fused")
        return arrays | {"valid": teacher_arrays["valid"]}

    def _flow(
        self,
        teacher_arrays: Mapping[str, np.ndarray],
        device: torch.device,
        directions: Directions,
        *,
        reverse: bool = False,
    ) -> dict[str, np.ndarray]:
        """Compute the Gram flow of each map to the next; `reverse`: of the next to it."""

        def features(start: int, stop: int) -> Tensor:
            return self._select_directions(
                _decode_maps(teacher_arrays, slice(start, stop), device), directions
            )

        maps = len(teacher_arrays["valid"])
        parts = self._native_parts
        if parts is not None and directions != "fused":
            parts //= 2
        norm_P = None
        if parts is not None:
            starts = range(0, maps, _PAIRS_PER_BATCH)
            norm_P = part_norms((features(s, s + _PAIRS_PER_BATCH) for s in starts), parts)
        encoded = []
        for start in range(0, maps - 1, _PAIRS_PER_BATCH):
            flow_PHWK = compute_gram_flow(
                features(start, start + _PAIRS_PER_BATCH + 1),
                radius=self._config.radius,
                token_grid=self._token_grid,
                native_parts=parts,
                norm_P=norm_P,
            )
            if reverse:
                flow_PHWK = reverse_pairs(flow_PHWK[None])[0]
            encoded.append(encode_gram_flow(flow_PHWK, self._config.dtype))
        return {name: np.concatenate([one[name] for one in encoded]) for name in encoded[0]}

    def _select_directions(self, fused_THWG: Tensor, directions: Directions) -> Tensor:
        if directions == "fused":
            return fused_THWG
        forward_weight, parts = stored_forward_weight(self._teacher), self._teacher.values["parts"]
        assert forward_weight is not None and isinstance(parts, int), "checked with the settings"
        return take_directions(fused_THWG, parts, directions, forward_weight=forward_weight)


def _decode_maps(
    teacher_arrays: Mapping[str, np.ndarray], maps: slice, device: torch.device
) -> Tensor:
    """Decode the features of a slice of maps on the device."""
    return decode_features(
        {
            name: torch.from_numpy(values[maps]).to(device)
            for name, values in teacher_arrays.items()
            if name != "valid"
        }
    )
