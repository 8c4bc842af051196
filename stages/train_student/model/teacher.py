"""The teacher of a batch, whichever form it is stored in; objectives ask it for what they compare.

Legend: B clip, T map of the teacher or frame of the masks, P pair of maps (T-1), H W token grid,
h w pixel of the stored masks, G fused channel, K neighbour.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from cache_schema import StoreSettings
from stages.config import Pairs
from stages.local_gram_flow import (
    Directions,
    frames_to_latents,
    local_gram_flow,
    radius_of_window,
    regrid_fused,
    resample_to_grid,
    reverse_pairs,
    take_directions,
)
from stages.teacher_store.features import decode_features
from stages.teacher_store.gram_flow import back_arrays, decode_gram_flow, narrow_window
from stages.teacher_store.settings import forward_share, native_parts

PairDirection = Literal["forward", "backward"]
"""Which map of a pair the tokens lie in whose windows are compared: the first, or the second."""

_MASK_MOST = 255
"""What a stored mask holds where a pixel is the subject's for certain."""


class HasSettings(Protocol):
    """A store, or one that is not there yet."""

    @property
    def settings(self) -> StoreSettings:
        """What a store of its kind holds and how it was made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLayout:
    """How the channels and tokens of stored features lie; the same for every clip of a store."""

    native: bool = False
    """Whether they lie on SAM2's own grid and are to be resampled to the student's."""
    parts: int = 1
    """Into how many equal groups the channels fall: a direction of a subject each."""
    forward_weight: float | None = None
    """Share of the forward direction; None where the parts are no pairs of directions fused in
    Gram-flow space."""

    @classmethod
    def of(cls, store: HasSettings | None) -> Self:
        """As a teacher store's settings say; no store and a Gram flow have nothing to lay out.

        Raises:
            ValueError: features on SAM2's own grid do not say how many parts they have.
        """
        if store is None or "features" not in store.settings.arrays:
            return cls()
        parts = store.settings.values.get("parts")
        return cls(
            native=native_parts(store.settings) is not None,
            parts=parts if isinstance(parts, int) else 1,
            forward_weight=forward_share(store.settings),
        )


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A batch's arrays as they are stored, on the device, and which maps count."""

    arrays: Mapping[str, Tensor] | None
    """Of the teacher's store, or of the gram_flow store; every array with B in front. None where no
    objective asks for them."""
    valid_BT: Tensor | None
    """bool, the maps of `arrays` that count."""
    masks: Mapping[str, Tensor] | None = None
    """Of the masks store: uint8 `forward` and `backward` [B, T, h, w] and `valid` [B, T]."""
    num_frames: int
    """Of the clips."""
    token_grid: tuple[int, int]
    """Rows and columns of the student's tokens."""
    layout: TeacherLayout = TeacherLayout()

    @torch.no_grad()
    def gram_flows(
        self, radius: int, pairs: Pairs = "forward", directions: Directions = "fused"
    ) -> dict[PairDirection, Tensor]:
        """The similarities of each token to its window in the map beside it: flow_BPHWK for each
        direction that `pairs` names.

        Computed from features, in float32; or read, the middle of a window that may be larger.

        Args:
            radius: half the window.
            pairs: `crossed` is `forward` of the backward track and `backward` of the forward one.
            directions: of the other pairs; other than `fused` only from features that were fused in
                Gram-flow space.

        Returns:
            `forward`, of each map's tokens in the next map, and `backward`, of each next map's in
            the one before.

        Raises:
            ValueError: what is stored has a smaller window, other pairs, or no separate tracks.
        """
        assert self.arrays is not None, "an objective that compares features needs a teacher"
        if "gram_flow" in self.arrays:
            assert directions == "fused", "checked before training"
            back = back_arrays(self.arrays)
            if (back is not None) != (pairs == "crossed"):
                held = "forward" if back is None else "crossed"
                raise ValueError(f"a Gram flow with pairs {held} does not hold pairs {pairs}")
            forward_BPHWK = _stored_flow(self.arrays, radius)
            if back is not None:
                return {"forward": forward_BPHWK, "backward": _stored_flow(back, radius)}
        elif pairs == "crossed":
            ahead, behind = (
                local_gram_flow(self._features(track), radius) for track in ("backward", "forward")
            )
            return {"forward": ahead, "backward": reverse_pairs(behind)}
        else:
            forward_BPHWK = local_gram_flow(self._features(directions), radius)
        flows: dict[PairDirection, Tensor] = {}
        if pairs != "backward":
            flows["forward"] = forward_BPHWK
        if pairs != "forward":
            flows["backward"] = reverse_pairs(forward_BPHWK)
        return flows

    @cached_property
    def features_BTHWG(self) -> Tensor:
        """Fused features on the student's grid; maps that do not count hold zeros."""
        return self._features("fused")

    @torch.no_grad()
    def features_at_latent_rate(self) -> tuple[Tensor, Tensor]:
        """Fused features with one map for each latent frame: fused_BLHWG.

        The mean over its frames' maps where the teacher has one for each frame.

        Returns:
            It, and valid_BL, bool: the latents all of whose frames' maps count.
        """
        assert self.valid_BT is not None, "a teacher says which maps are valid"
        fused_BTHWG, valid_BT = self.features_BTHWG, self.valid_BT
        if valid_BT.shape[1] != self.num_frames:
            return fused_BTHWG, valid_BT
        fused_BLHWG = torch.stack([frames_to_latents(clip.float()) for clip in fused_BTHWG])
        share_LB11 = frames_to_latents(valid_BT.T[:, :, None, None].float())
        return fused_BLHWG, share_LB11[..., 0, 0].T == 1

    @torch.no_grad()
    def mask_share(self) -> tuple[Tensor, Tensor]:
        """What share of each token the subject covers: share_BTHW, 0 to 1, for every frame.

        The mean of the directions that were tracked.

        Returns:
            It, and valid_BT, bool: the frames in which the subject is seen; others hold zeros.
        """
        assert self.masks is not None, "an objective that compares masks needs the masks store"
        valid_BT = self.masks["valid"] != 0
        directions = [mask for name, mask in self.masks.items() if name != "valid"]
        mask_BThw = sum(mask.float() for mask in directions) / (_MASK_MOST * len(directions))
        assert isinstance(mask_BThw, Tensor), "a masks store holds a direction"
        share_NHW1 = resample_to_grid(mask_BThw.flatten(0, 1)[:, None], *self.token_grid)
        share_BTHW = share_NHW1[..., 0].unflatten(0, valid_BT.shape)
        return share_BTHW.masked_fill(~valid_BT[..., None, None], 0.0), valid_BT

    @torch.no_grad()
    def token_weight(self, foreground_weight: float) -> Tensor:
        """How much each token counts, by how much of it is the subject: weight_BTHW.

        1 + (foreground_weight - 1) * share for every frame, 1 where the mask is not valid; at the
        latent rate the mean over each latent's frames.
        """
        assert self.valid_BT is not None, "weights are for the teacher's maps"
        share_BTHW, _ = self.mask_share()
        weight_BTHW = 1.0 + (foreground_weight - 1.0) * share_BTHW
        if self.valid_BT.shape[1] == self.num_frames:
            return weight_BTHW
        weight_TBHW = frames_to_latents(weight_BTHW.transpose(0, 1))
        return weight_TBHW.transpose(0, 1)

    @torch.no_grad()
    def _features(self, directions: Directions) -> Tensor:
        assert self.arrays is not None, "an objective that compares features needs a teacher"
        if directions == "fused" and "features_BTHWG" in self.__dict__:
            return self.features_BTHWG
        fused_BTHWG = decode_features(self.arrays)
        assert self.valid_BT is not None, "a teacher says which maps are valid"
        fused_BTHWG = fused_BTHWG.masked_fill(~self.valid_BT[..., None, None, None], 0.0)
        layout, parts = self.layout, self.layout.parts
        if directions != "fused":
            assert layout.forward_weight is not None, "checked before training"
            fused_BTHWG = take_directions(
                fused_BTHWG, parts, directions, forward_weight=layout.forward_weight
            )
            parts //= 2
        if not layout.native:
            return fused_BTHWG
        # Clip by clip: the norm of a part is constant within one.
        regridded = [
            regrid_fused(fused_THWG, *self.token_grid, parts) for fused_THWG in fused_BTHWG
        ]
        return torch.stack(regridded)


def _stored_flow(arrays: Mapping[str, Tensor], radius: int) -> Tensor:
    stored_BPHWK = arrays["gram_flow"]
    narrow = narrow_window(stored_BPHWK, radius_of_window(stored_BPHWK.shape[-1]), radius)
    return decode_gram_flow({**arrays, "gram_flow": narrow})
