"""Scores of a tracker on drawn clips that it was not trained on."""

# Legend: T frame, S side of SAM2's square input.

from typing import Any

import numpy as np
import torch

from stages.demo.training.drawn_clips import HELD_OUT_SEEDS
from stages.demo.training.figure_tracks import (
    PROMPT_KINDS,
    PromptKind,
    points_of,
    square_clip,
)
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.step import enlarge_mask
from stages.sam2_tracking.tracker import TrackedFrame, Tracker, TrackRequest

_GONE = slice(6, 10)
"""Frames without the subject, where visibility is scored."""


def held_out_scores(tracker: Tracker, *, num_clips: int) -> dict[str, Any]:
    """Track drawn clips both ways from each kind of prompt.

    Args:
        tracker: A tracker of drawn figures.
        num_clips: Clips to track, with the first held-out seeds.

    Returns:
        JSON values. `iou`: for each kind of prompt and direction, the mean over the clips at each
        visited frame after the prompted one. `visible_found`, `absent_found`: fractions of frames
        with the subject, and of frames in which it is not drawn, where the tracker says so.
    """
    ious: dict[str, list[list[float]]] = {}
    visible: list[bool] = []
    absent: list[bool] = []
    for seed in HELD_OUT_SEEDS[:num_clips]:
        clip = square_clip(seed, tracker.model.image_size)
        frames_TSSC, masks_TSS = clip.frames_TSSC, clip.masks_TSS
        for kind in PROMPT_KINDS:
            for direction, way in (("forward", 1), ("backward", -1)):
                real_TSS = masks_TSS[::way]
                tracked = follow(tracker, frames_TSSC[::way], real_TSS[0], kind)
                found = [
                    mask_iou(tracker, one, real_SS)
                    for one, real_SS in zip(tracked, real_TSS, strict=True)
                ]
                ious.setdefault(f"{kind} {direction}", []).append(found[1:])
        gone_TSSC = frames_TSSC.copy()
        gone_TSSC[_GONE] = clip.scenery_TSSC[_GONE]
        shown = [bool(one.visible) for one in follow(tracker, gone_TSSC, masks_TSS[0], "mask")]
        absent += [not one for one in shown[_GONE]]
        visible += shown[: _GONE.start] + shown[_GONE.stop :]
    return {
        "clips": num_clips,
        "iou": {name: np.round(np.mean(rows, 0), 3).tolist() for name, rows in ious.items()},
        "mean_iou": {name: round(float(np.mean(rows)), 3) for name, rows in ious.items()},
        "visible_found": round(float(np.mean(visible)), 3),
        "absent_found": round(float(np.mean(absent)), 3),
    }


def follow(
    tracker: Tracker, frames_TSSC: np.ndarray, mask_SS: np.ndarray, kind: PromptKind
) -> list[TrackedFrame]:
    """Track a subject from a prompt on the first frame.

    Args:
        tracker: Its input has side S.
        frames_TSSC: uint8.
        mask_SS: The subject on the first frame, from which the prompt is made.
        kind: Kind of prompt; its box and points do not vary between calls.
    """
    if kind == "mask":
        prompt = Sam2Prompt(mask_11SS=torch.from_numpy(mask_SS.copy())[None, None].float())
    else:
        points_1P2, labels_1P = points_of(np.random.default_rng(0), mask_SS[None], kind)
        prompt = Sam2Prompt(
            points_1P2=torch.from_numpy(points_1P2), point_labels_1P=torch.from_numpy(labels_1P)
        )
    with tracker.encode(np.ascontiguousarray(frames_TSSC)) as encoded:
        request = TrackRequest(encoded=encoded, prompt=prompt, order=range(len(frames_TSSC)))
        return [one for (one,) in tracker.track([request], features=())]


def mask_iou(tracker: Tracker, tracked: TrackedFrame, real_SS: np.ndarray) -> float:
    """IoU of a tracked mask and the real one; NaN if both are empty."""
    logits_11SS = enlarge_mask(tracker.model.image_size, tracked.mask_logits_HW[None, None])
    found_SS = (logits_11SS[0, 0] > 0).numpy()
    union = (found_SS | real_SS).sum()
    return float((found_SS & real_SS).sum() / union) if union else float("nan")
