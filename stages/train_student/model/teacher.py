"""A batch's teacher: Gram flows, features and masks decoded from the stored arrays.

SAM2's, or the tokens of an image or video encoder.

Legend: B clip, T map of the teacher or frame of the masks, P pair of maps (T-1), H W token grid,
h w pixel of the stored masks, G fused channel, K neighbour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from cache_schema import StoreReader, StoreSettings
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
from stages.teacher_store.settings import native_parts, stored_forward_weight

PairDirection = Literal["forward", "backward"]
"""Query map of a pair: tokens of the first map (forward) or of the second (backward)."""

_MASK_MAX = 255
"""Value of a stored mask at probability 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLayout:
    """Grid and channel layout of stored features; the same for every clip of a store."""

    native: bool = False
    """Whether features are on the teacher's own grid and must be resampled to the student's."""
    parts: int = 1
    """Number of equal channel groups: one per direction and subject."""
    forward_weight: float | None = None
    """Weight of the forward direction; None if the parts are not pairs of directions fused in
    Gram-flow space."""
    visual: bool = False
    """Whether the features are an encoder's tokens, whose norms differ, instead of SAM2's fused
    unit tokens."""
    frames_per_map: int | None = None
    """Frames of a tubelet, from frame 1 on; None for maps of frames or latent frames."""

    @classmethod
    def of(cls, teacher: StoreSettings | None) -> Self:
        """Read the layout from a teacher or visual store's settings; default without features.

        Raises:
            ValueError: features are on SAM2's own grid, but the setting `parts` is missing.
        """
        if teacher is None or "features" not in teacher.arrays:
            return cls()
        if teacher.kind == "visual":
            tubelet = teacher.values.get("frames_per_map")
            return cls(
                native=teacher.values.get("grid_source") == "native",
                visual=True,
                frames_per_map=tubelet if isinstance(tubelet, int) else None,
            )
        parts = teacher.values.get("parts")
        return cls(
            native=native_parts(teacher) is not None,
            parts=parts if isinstance(parts, int) else 1,
            forward_weight=stored_forward_weight(teacher),
        )


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A batch's stored teacher arrays, on the device, and the validity of their maps."""

    arrays: Mapping[str, Tensor] | None
    """Arrays of the teacher, gram_flow or visual store, with a leading B; None if no objective
    reads them."""
    valid_BT: Tensor | None
    """bool, valid maps of `arrays`."""
    masks: Mapping[str, Tensor] | None = None
    """Arrays of the masks store: uint8 `forward` and `backward` [B, T, h, w] and `valid` [B, T]."""
    num_frames: int
    """Frames per clip."""
    token_grid: tuple[int, int]
    """Rows and columns of the student's tokens."""
    layout: TeacherLayout = TeacherLayout()

    @classmethod
    def read(
        cls,
        reader: StoreReader,
        keys: Sequence[str],
        *,
        num_frames: int,
        token_grid: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read clips from a store, for a trainer with a loader of its own.

        Args:
            reader: of a teacher or gram_flow store.
            keys: the clips of the batch, in its order.
            num_frames: frames per clip.
            token_grid: rows and columns of the student's tokens.
            device: device of the arrays.

        Raises:
            ValueError: the store is of another kind.
            CacheError: a clip is missing or damaged, or the cache cannot be reached.
        """
        if reader.settings.kind not in ("teacher", "gram_flow"):
            raise ValueError(
                f"{reader.path} is a store of kind {reader.settings.kind!r}; a teacher is read "
                "from one of kind 'teacher' or 'gram_flow'"
            )
        clips = [reader.read(key) for key in keys]
        arrays = {
            name: torch.from_numpy(np.stack([clip[name] for clip in clips])).to(device)
            for name in reader.settings.arrays
        }
        valid_BT = arrays.pop("valid") != 0
        return cls(
            arrays=arrays,
            valid_BT=valid_BT,
            num_frames=num_frames,
            token_grid=token_grid,
            layout=TeacherLayout.of(reader.settings),
        )

    @torch.no_grad()
    def gram_flows(
        self, radius: int, pairs: Pairs = "forward", directions: Directions = "fused"
    ) -> dict[PairDirection, Tensor]:
        """Similarities of each token to its window in the adjacent map: flow_BPHWK by direction.

        Computed from features in float32, or read from a stored Gram flow and cropped to `radius`.

        Args:
            radius: half the window.
            pairs: pair directions to return; `crossed` takes `forward` from the backward track and
                `backward` from the forward track.
            directions: tracking directions to use, except for `crossed`; other than `fused` only
                for features that were fused in Gram-flow space.

        Returns:
            `forward`: each map's tokens against the next map; `backward`: against the previous map.

        Raises:
            ValueError: the stored Gram flow has a smaller window or other pairs, or the features
                have no separate tracks.
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
        """Fused features on the student's grid; invalid maps are zero."""
        return self._features("fused")

    @torch.no_grad()
    def features_at_latent_rate(self) -> tuple[Tensor, Tensor]:
        """Fused features with one map per latent frame.

        A teacher with one map per frame is averaged over the frames of each latent frame.

        Returns:
            fused_BLHWG, and valid_BL, bool: latent frames of which every frame's map is valid.
        """
        assert self.valid_BT is not None, "a teacher says which maps are valid"
        fused_BTHWG, valid_BT = self.features_BTHWG, self.valid_BT
        if valid_BT.shape[1] != self.num_frames:
            return fused_BTHWG, valid_BT
        fused_BLHWG = torch.stack([frames_to_latents(clip.float()) for clip in fused_BTHWG])
        valid_fraction_LB11 = frames_to_latents(valid_BT.T[:, :, None, None].float())
        return fused_BLHWG, valid_fraction_LB11[..., 0, 0].T == 1

    @torch.no_grad()
    def mask_coverage(self) -> tuple[Tensor, Tensor]:
        """Fraction of each token that the subject covers, per frame.

        The mean over the tracked directions.

        Returns:
            coverage_BTHW, 0 to 1, and valid_BT, bool: frames in which the subject is visible;
            coverage is zero in the others.
        """
        assert self.masks is not None, "an objective that compares masks needs the masks store"
        valid_BT = self.masks["valid"] != 0
        directions = [mask for name, mask in self.masks.items() if name != "valid"]
        mask_BThw = sum(mask.float() for mask in directions) / (_MASK_MAX * len(directions))
        assert isinstance(mask_BThw, Tensor), "the masks store has no direction"
        coverage_NHW1 = resample_to_grid(mask_BThw.flatten(0, 1)[:, None], *self.token_grid)
        coverage_BTHW = coverage_NHW1[..., 0].unflatten(0, valid_BT.shape)
        return coverage_BTHW.masked_fill(~valid_BT[..., None, None], 0.0), valid_BT

    @torch.no_grad()
    def token_weight(self, foreground_weight: float) -> Tensor:
        """Loss weight of each token, from its mask coverage: weight_BTHW.

        1 + (foreground_weight - 1) * coverage per frame, 1 where the mask is invalid; at the latent
        rate the mean over each latent frame's frames.
        """
        assert self.valid_BT is not None, "weights are for the teacher's maps"
        coverage_BTHW, _ = self.mask_coverage()
        weight_BTHW = 1.0 + (foreground_weight - 1.0) * coverage_BTHW
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
        if layout.visual:
            return self._resampled(fused_BTHWG)
        # Clip by clip: the norm of a part is constant only within a clip.
        regridded = [
            regrid_fused(fused_THWG, *self.token_grid, parts) for fused_THWG in fused_BTHWG
        ]
        return torch.stack(regridded)

    def _resampled(self, tokens_BTHWG: Tensor) -> Tensor:
        """An encoder's tokens on the student's grid, in at least float32."""
        if tokens_BTHWG.shape[2:4] == self.token_grid:
            return tokens_BTHWG
        dtype = torch.promote_types(tokens_BTHWG.dtype, torch.float32)
        maps_NGHW = tokens_BTHWG.to(dtype).flatten(0, 1).permute(0, 3, 1, 2)
        resampled_NHWG = resample_to_grid(maps_NGHW, *self.token_grid)
        return resampled_NHWG.unflatten(0, tokens_BTHWG.shape[:2])


def _stored_flow(arrays: Mapping[str, Tensor], radius: int) -> Tensor:
    stored_BPHWK = arrays["gram_flow"]
    narrow = narrow_window(stored_BPHWK, radius_of_window(stored_BPHWK.shape[-1]), radius)
    return decode_gram_flow({**arrays, "gram_flow": narrow})
