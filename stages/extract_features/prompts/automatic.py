"""Automatic prompts: the most salient moving region among SAM2's mask proposals.

SAM2's mask decoder proposes up to three masks for each point of a grid on frame 0. `camera_motion`
estimates the speed of each token relative to the camera, and `salience` documents and applies the
rule that chooses one of the masks as the subject.
"""

# Legend: N point or proposal, S side of SAM2's square input, H W pixels or token grid, C channel,
# F frame compared with frame 0.

import torch
import torch.nn.functional as F  # noqa: N812

from cache_schema import JSON
from stages.clips import Clip, ClipSkipped, SubjectPrompt
from stages.extract_features.prompts.camera_motion import PRIOR, RADIUS, OwnMotion, own_motion
from stages.extract_features.prompts.prompt import ChosenPrompt
from stages.extract_features.prompts.salience import (
    RULE_VERSION,
    choose_subject,
    select_candidates,
)
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.tracker import Tracker

_POINTS_PER_SIDE = 16
_GAPS = (1, 2, 4, 8)
"""Frames that frame 0 is compared with, as distances from it."""
_LEVEL = 1
_GRID = 64
"""Maximum tokens per side for motion estimation, so that a window of `RADIUS` tokens covers the
same part of the frame at 512 and 1024 pixels."""


class AutomaticSource:
    """Chooses a subject without a given prompt.

    Args:
        image_size: S.
    """

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size
        self.settings: dict[str, JSON] = {
            "rule": RULE_VERSION,
            "points_per_side": _POINTS_PER_SIDE,
            "frames": [0, *_GAPS],
            "level": _LEVEL,
            "grid": _GRID,
            "radius": RADIUS,
            "prior": PRIOR,
        }

    @torch.inference_mode()
    def find(self, clip: Clip, tracker: Tracker, encoded: EncodedFrames) -> ChosenPrompt:
        """Return the mask chosen by the rule, on frame 0.

        Raises:
            ClipSkipped: nothing_found, if SAM2 proposes no mask that could be a subject.
        """
        proposals = tracker.propose_masks(encoded, 0, self._grid_of_points())
        candidates = select_candidates(
            proposals.logits.flatten(0, 1), proposals.predicted_iou.flatten()
        )
        if len(candidates) == 0:
            raise ClipSkipped(
                "nothing_found",
                f"none of SAM2's {proposals.predicted_iou.numel()} masks on frame 0 is sure, "
                "stable and of a subject's size",
            )
        choice = choose_subject(candidates, motion_of_tokens(encoded))
        height, width = clip.frames_THWC.shape[1:3]
        mask_HW = _enlarge(candidates.logits_NSS[choice.index], height, width) > 0
        if not mask_HW.any():
            raise ClipSkipped("nothing_found", "the mask chosen vanishes at the clip's size")
        index = choice.index
        return ChosenPrompt(
            source="automatic",
            subjects=(SubjectPrompt(mask_HW=mask_HW.numpy()),),
            confidence=choice.score,
            detail={
                "moves": choice.moves,
                "tokens_per_frame": round(choice.speed, 4),
                "area": round(float(candidates.area_N[index]), 4),
                "predicted_iou": round(float(candidates.predicted_iou_N[index]), 4),
                "stability": round(float(candidates.stability_N[index]), 4),
                "candidates": len(candidates),
            },
        )

    def _grid_of_points(self) -> torch.Tensor:
        """Return x, y of the centres of equal cells, in pixels of SAM2's square: [N, 2]."""
        places = (torch.arange(_POINTS_PER_SIDE) + 0.5) * self._image_size / _POINTS_PER_SIDE
        y, x = torch.meshgrid(places, places, indexing="ij")
        return torch.stack([x.flatten(), y.flatten()], dim=-1)


def motion_of_tokens(encoded: EncodedFrames) -> OwnMotion:
    """Estimate the motion of frame 0's tokens relative to the camera over the next frames.

    Uses the second level of the image encoder, averaged to at most 64 tokens per side: its features
    describe texture, which can be matched. The last level's describe semantics, and the borders of
    the encoder's windows, which do not move.
    """
    gaps = [gap for gap in _GAPS if gap < encoded.num_frames]
    features_NFC = encoded.levels_at([0, *gaps])[_LEVEL]
    height, width = encoded.sizes[_LEVEL]
    features_FCHW = features_NFC.permute(1, 2, 0).unflatten(2, (height, width)).float()
    factor = -(-max(height, width) // _GRID)
    features_FCHW = F.adaptive_avg_pool2d(features_FCHW, (height // factor, width // factor))
    features_FHWC = features_FCHW.permute(0, 2, 3, 1)
    return own_motion(features_FHWC[0], features_FHWC[1:], gaps)


def _enlarge(logits_SS: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize from SAM2's square to the training frame: [H, W]."""
    return F.interpolate(
        logits_SS[None, None], size=(height, width), mode="bilinear", align_corners=False
    )[0, 0]
