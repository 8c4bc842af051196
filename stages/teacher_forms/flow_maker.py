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
from stages.local_gram_flow import part_norms
from stages.teacher_forms.config import GramFlowConfig
from stages.teacher_forms.features import decode_features
from stages.teacher_forms.gram_flow import encode_gram_flow, gram_flow_of
from stages.teacher_forms.settings import gram_flow_settings, native_parts

_PAIRS_AT_ONCE = 8
"""Pairs of maps that are on the device together: its memory does not grow with a clip's length."""


class FlowMaker:
    """Makes the Gram flow of clips of one teacher store.

    Args:
        settings: of the Gram flow's store.
        config: the window and how it is stored.
        token_grid: of the student.
        native_parts: of features on SAM2's own grid; None for the student's.
    """

    def __init__(
        self,
        settings: StoreSettings,
        config: GramFlowConfig,
        token_grid: tuple[int, int],
        native_parts: int | None,
    ) -> None:
        self.settings = settings
        self._config = config
        self._token_grid = token_grid
        self._native_parts = native_parts

    @classmethod
    def of(
        cls, teacher: StoreSettings, config: GramFlowConfig, token_grid: tuple[int, int]
    ) -> Self:
        """For the clips of a store with the settings `teacher`.

        Raises:
            ValueError: What `gram_flow_settings` raises.
        """
        settings = gram_flow_settings(
            teacher, radius=config.radius, dtype=config.dtype, token_grid=token_grid
        )
        return cls(settings, config, token_grid, native_parts(teacher))

    def __call__(
        self, teacher_arrays: Mapping[str, np.ndarray], device: torch.device
    ) -> dict[str, np.ndarray]:
        """A clip's arrays, from what the teacher store holds of it.

        The same arrays give the same bytes on the same device and number of threads.
        """
        maps = len(teacher_arrays["valid"])
        norm_P = None
        if self._native_parts is not None:
            pieces = (
                _features(teacher_arrays, slice(start, start + _PAIRS_AT_ONCE), device)
                for start in range(0, maps, _PAIRS_AT_ONCE)
            )
            norm_P = part_norms(pieces, self._native_parts)
        encoded = [
            self._encoded(
                _features(teacher_arrays, slice(start, start + _PAIRS_AT_ONCE + 1), device), norm_P
            )
            for start in range(0, maps - 1, _PAIRS_AT_ONCE)
        ]
        arrays = {name: np.concatenate([one[name] for one in encoded]) for name in encoded[0]}
        return arrays | {"valid": teacher_arrays["valid"]}

    def _encoded(self, features_THWG: Tensor, norm_P: Tensor | None) -> dict[str, np.ndarray]:
        """Of some neighbouring maps."""
        flow_PHWK = gram_flow_of(
            features_THWG,
            radius=self._config.radius,
            token_grid=self._token_grid,
            native_parts=self._native_parts,
            norm_P=norm_P,
        )
        return encode_gram_flow(flow_PHWK, self._config.dtype)


def _features(
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
