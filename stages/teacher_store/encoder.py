"""A clip's entry in the teacher store becomes its entry in the Gram flow's store.

Extraction and derivation both come through here, from the same stored values, so that their
entries are equal.
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
from stages.teacher_store.gram_flow import encode_gram_flow, gram_flow_of, with_back_suffix
from stages.teacher_store.settings import forward_share, gram_flow_settings, native_parts

_PAIRS_PER_BATCH = 8
"""Pairs of maps that are on the device together: its memory does not grow with a clip's length."""


class FlowMaker:
    """Makes the Gram flow of clips of one teacher store.

    Args:
        settings: of the Gram flow's store.
        config: which pairs, the window, and how it is stored.
        token_grid: of the student.
        teacher: settings of the teacher store.
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
        """For the clips of a store with the settings `teacher`.

        Raises:
            ValueError: What `gram_flow_settings` raises.
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
        """A clip's arrays, from what the teacher store holds of it.

        The same arrays give the same bytes on the same device and number of threads.
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
        """Of those tracks, each map to the next; or the next to it."""

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
            flow_PHWK = gram_flow_of(
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
        forward_weight, parts = forward_share(self._teacher), self._teacher.values["parts"]
        assert forward_weight is not None and isinstance(parts, int), "checked with the settings"
        return take_directions(fused_THWG, parts, directions, forward_weight=forward_weight)


def _decode_maps(
    teacher_arrays: Mapping[str, np.ndarray], maps: slice, device: torch.device
) -> Tensor:
    """The features of some maps, decoded on the device."""
    return decode_features(
        {
            name: torch.from_numpy(values[maps]).to(device)
            for name, values in teacher_arrays.items()
            if name != "valid"
        }
    )
