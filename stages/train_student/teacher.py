"""The teacher of a batch, whichever form it is stored in; objectives ask it for what they compare.

Legend: B clip, T map of the teacher, P pair of maps (T-1), H W token grid, G fused channel,
K neighbour.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.local_gram_flow import local_gram_flow, radius_of_window, regrid_fused
from stages.teacher_forms.features import decode_features
from stages.teacher_forms.gram_flow import decode_gram_flow, narrow_window


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A batch's arrays as they are stored, on the device, and which maps count."""

    arrays: Mapping[str, Tensor]
    """Of the teacher's store, or of the gram_flow store; every array with B in front."""
    valid_BT: Tensor
    """bool."""
    token_grid: tuple[int, int]
    """Rows and columns of the student's tokens."""
    native_parts: int | None
    """Into how many parts the channels of features fall that lie on SAM2's own grid; None where
    nothing is to be resampled."""

    @torch.no_grad()
    def gram_flow(self, radius: int) -> Tensor:
        """The similarities of each token to its window in the next map: flow_BPHWK.

        Computed from features, in float32; or read, the middle of a window that may be larger.

        Raises:
            ValueError: the stored window is smaller.
        """
        if "gram_flow" not in self.arrays:
            return local_gram_flow(self._features(), radius)
        stored_BPHWK = self.arrays["gram_flow"]
        narrow = narrow_window(stored_BPHWK, radius_of_window(stored_BPHWK.shape[-1]), radius)
        return decode_gram_flow({**self.arrays, "gram_flow": narrow})

    def _features(self) -> Tensor:
        """Fused features on the student's grid: fused_BTHWG."""
        fused_BTHWG = decode_features(self.arrays)
        if self.native_parts is None:
            return fused_BTHWG
        # Clip by clip: the norm of a part is constant within one.
        regridded = [
            regrid_fused(fused_THWG, *self.token_grid, self.native_parts)
            for fused_THWG in fused_BTHWG
        ]
        return torch.stack(regridded)
