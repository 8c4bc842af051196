"""Fused features of one clip that is in memory, without a dataset or a store."""

# Legend: T frame, H W pixels or token grid, G fused channel.

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.clips import SubjectPrompt
from stages.config import FeatureKind
from stages.extract_features.teacher.stores import refusal
from stages.extract_features.teacher.two_way import Subject, SubjectTrack, SubjectTracker
from stages.local_gram_flow import fuse_directions
from stages.sam2_tracking.inputs import prompt_for_sam2, resize_for_sam2
from stages.sam2_tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipFeatures:
    """A clip's fused features and the tracks that they are from, on the tracker's device."""

    features_THWG: Tensor
    """float32; unit norm, the forward track's channels before the backward track's. 0 on frames
    that a track has not visited."""
    valid_T: Tensor
    """bool, on the host: frames on which both tracks see the subject."""
    track: SubjectTrack
    """Both tracks: mask logits, frames seen, features before fusion, cycle consistency."""


@torch.inference_mode()
def fused_features(
    tracker: Tracker,
    frames_THWC: np.ndarray,
    prompt: SubjectPrompt,
    *,
    token_grid: tuple[int, int],
    features: FeatureKind = "memory_attention",
    forward_weight: float = 0.5,
) -> ClipFeatures:
    """Track a subject through a clip in both directions, and fuse the tracks' features.

    The features are those that `extract-features` stores for the same frames and settings, before
    their rounding to float16.

    Args:
        tracker: On its device: `Tracker(build_tracker(None, checkpoint), precision="fp32")`.
        frames_THWC: uint8 RGB, at least two frames.
        prompt: The subject on frame 0: a mask, a box or points in pixels of `frames_THWC`.
        token_grid: Rows and columns of the features; (30, 45) for CogVideoX at 480x720.
        features: Which of SAM2's features to fuse.
        forward_weight: Weight of the forward track in the fused similarities.

    Raises:
        ClipSkipped: bad_prompt, if the prompt's mask is empty at SAM2's size; subject_lost, if no
            two consecutive frames show the subject in both tracks.
        ValueError: `frames_THWC` is not uint8 [T >= 2, H, W, 3].

    Source: Structure From Tracking, arXiv 2512.11792.
    """
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3:
        raise ValueError(
            "frames must be uint8 RGB [frame, height, width, 3], got "
            f"{frames_THWC.dtype} {frames_THWC.shape}"
        )
    if len(frames_THWC) < 2:
        raise ValueError("tracking needs at least 2 frames, got 1")
    _, height, width, _ = frames_THWC.shape
    image_size, device = tracker.model.image_size, tracker.model.device
    sam2_prompt = prompt_for_sam2(
        prompt, height=height, width=width, image_size=image_size, device=device
    )
    both_ways = SubjectTracker(
        tracker=tracker,
        both_ways=True,
        features=features,
        feature_grid=token_grid,
        passes_at_once=1,
        keep_on=device,
    )
    with tracker.encode(resize_for_sam2(frames_THWC, image_size)) as encoded:
        (track,) = both_ways.track([Subject(encoded=encoded, frame=0, prompt=sam2_prompt)])
    if not isinstance(track, SubjectTrack):
        raise track
    skipped = refusal([track], min_cycle_consistency=0.0)
    if skipped is not None:
        raise skipped
    assert track.backward is not None, "both ways"
    assert track.forward.features_THWC is not None and track.backward.features_THWC is not None
    fused_THWG = fuse_directions(
        track.forward.features_THWC,
        track.backward.features_THWC,
        fusion="gram_flow",
        forward_weight=forward_weight,
    )
    visited_T = track.visited_T.to(device)
    return ClipFeatures(
        features_THWG=fused_THWG * visited_T[:, None, None, None],
        valid_T=track.usable_T,
        track=track,
    )
