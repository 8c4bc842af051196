"""Drawn clips as training examples for a tracker: frames, the subject's masks, and prompts.

Besides the figure of a clip, an example may show a second figure, in front of it or behind; or the
subject is absent in some frames.
"""

# Legend: B example, T frame, S side of SAM2's square input, C colour (RGB), P point.

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from stages.demo.backgrounds import smooth_noise
from stages.demo.training.drawn_clips import (
    NUM_FRAMES,
    NUM_KINDS,
    draw_demo_clip,
    training_seed,
)
from stages.sam2_tracking.inputs import resize_for_sam2

PromptKind = Literal["mask", "box", "point", "points"]
"""A mask, a box, one point, or three points."""
PROMPT_KINDS: tuple[PromptKind, ...] = get_args(PromptKind)

_FRAME_RATES = (8.0, 16.0)
_POOL = 96
"""Clips from which the examples of a step are made."""
_NEW_CLIPS = 3
"""Clips of the pool that are replaced at each step."""
_MIN_VISIBLE = 0.5
"""Fraction of the subject that must be visible on the prompted frame."""
_BOX_NOISE = 0.05
"""Standard deviation of a box's corners, relative to its sides."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FigureTracks:
    """A batch of examples; frame 0 is the prompted one."""

    frames_BTSSC: np.ndarray
    """uint8."""
    masks_BTSS: np.ndarray
    """bool: visible pixels of the subject; empty where it is absent."""
    figures_BSS: np.ndarray
    """int8: on frame 0, 1 on the subject, 2 on another figure, 0 elsewhere."""


Absence = Literal["cut", "gone"]
"""How a subject becomes absent for some frames: a cut to another clip, or it is not drawn."""


class SquareClip(NamedTuple):
    """A drawn clip, or some of its frames, resized for SAM2."""

    seed: int
    frames_TSSC: np.ndarray
    """uint8."""
    masks_TSS: np.ndarray
    """bool: visible pixels of the figure."""
    scenery_TSSC: np.ndarray
    """uint8: the frames without the figure."""


def draw_tracks(
    step: int,
    *,
    seed: int,
    batch_size: int,
    num_frames: int,
    side: int,
    second_figure: float,
    absence: Absence,
    absent: float,
    degraded: float,
) -> FigureTracks:
    """Draw the training examples of a step; the same arguments give the same values.

    Args:
        step: Training step, from 0. Clips of earlier steps are used again for some steps.
        seed: Seed of the training run.
        batch_size: B.
        num_frames: T, at most 17.
        side: S.
        second_figure: Fraction of examples with a second figure.
        absence: How the subject becomes absent.
        absent: Fraction of the other examples in which it does.
        degraded: Fraction of examples that are blurred and fade in places, like the videos of a
            small diffusion model.
    """
    random, of_degrading = (np.random.default_rng(key) for key in ((seed, step), (seed, step, 2)))

    def clip(*, unlike: SquareClip | None = None) -> SquareClip:
        """A window of a clip, forward or reversed, of another kind of figure than `unlike`."""
        while True:
            index = step * _NEW_CLIPS + int(random.integers(_POOL))
            clip_seed = training_seed(index, run_seed=seed)
            if unlike is None or (clip_seed - unlike.seed) % NUM_KINDS:
                break
        whole = square_clip(clip_seed, side)
        start = int(random.integers(NUM_FRAMES - num_frames + 1))
        window = slice(start, start + num_frames)
        step_T = -1 if random.random() < 0.5 else 1
        return SquareClip(clip_seed, *(values[window][::step_T] for values in whole[1:]))

    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(examples) < batch_size:
        window = clip()
        frames_TSSC, masks_TSS = window.frames_TSSC, window.masks_TSS
        figures_SS = masks_TSS[0].astype(np.int8)
        if random.random() < second_figure:
            frames_TSSC, masks_TSS, figures_SS = _two_figures(random, window, clip())
        elif num_frames > 2 and random.random() < absent:
            # Figures of a kind look alike; only another kind shows that the subject is absent.
            other_TSSC = (
                clip(unlike=window).frames_TSSC if absence == "cut" else window.scenery_TSSC
            )
            frames_TSSC, masks_TSS = _without_subject(random, frames_TSSC, masks_TSS, other_TSSC)
        if of_degrading.random() < degraded:
            frames_TSSC = _degrade(of_degrading, frames_TSSC, window.scenery_TSSC)
        if masks_TSS[0].any():
            examples.append((frames_TSSC, masks_TSS, figures_SS))
    frames, masks, figures = zip(*examples, strict=True)
    return FigureTracks(
        frames_BTSSC=np.stack(frames), masks_BTSS=np.stack(masks), figures_BSS=np.stack(figures)
    )


@lru_cache(maxsize=2 * _POOL)
def square_clip(seed: int, side: int) -> SquareClip:
    """Draw a clip of the demo's size and resize it for SAM2; its frame rate depends on the seed."""
    rate = _FRAME_RATES[seed // NUM_KINDS % len(_FRAME_RATES)]
    clip = draw_demo_clip(seed, fps=rate)
    masks_1THW = torch.from_numpy(clip.masks_THW)[None].float()
    masks_1TSS = F.interpolate(masks_1THW, size=(side, side), mode="bilinear", antialias=True)
    return SquareClip(
        seed=seed,
        frames_TSSC=resize_for_sam2(clip.frames_THWC, side),
        masks_TSS=(masks_1TSS[0] >= 0.5).numpy(),
        scenery_TSSC=resize_for_sam2(clip.scenery_THWC, side),
    )


def _two_figures(
    random: np.random.Generator,
    clip: SquareClip,
    other: SquareClip,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paste the other clip's figure into the clip; either is the subject.

    Returns:
        Frames, masks of the subject, and the figures on frame 0.
    """
    frames_TSSC, back_TSS = clip.frames_TSSC, clip.masks_TSS
    side = back_TSS.shape[-1]
    shift = int(random.integers(-side // 2, side // 2))
    pasted_TSSC = np.roll(other.frames_TSSC, shift, axis=2)
    front_TSS = np.roll(other.masks_TSS, shift, axis=2)
    beyond = slice(0, shift) if shift >= 0 else slice(shift, None)
    front_TSS[:, :, beyond] = False
    if random.random() < 0.5:
        front_TSS = front_TSS & ~back_TSS
    else:
        back_TSS = back_TSS & ~front_TSS
    frames_TSSC = np.where(front_TSS[..., None], pasted_TSSC, frames_TSSC)
    subject_TSS, other_TSS = back_TSS, front_TSS
    hidden = back_TSS[0].sum() < _MIN_VISIBLE * clip.masks_TSS[0].sum()
    if random.random() < 0.5 or hidden:
        subject_TSS, other_TSS = other_TSS, subject_TSS
    figures_SS = subject_TSS[0].astype(np.int8) + 2 * other_TSS[0].astype(np.int8)
    return frames_TSSC, subject_TSS, figures_SS


def _without_subject(
    random: np.random.Generator,
    frames_TSSC: np.ndarray,
    masks_TSS: np.ndarray,
    other_TSSC: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Replace one to three frames after the first by others, in which the subject is absent."""
    num_frames = len(frames_TSSC)
    start = int(random.integers(1, num_frames))
    window = slice(start, start + int(random.integers(1, 4)))
    frames_TSSC, masks_TSS = frames_TSSC.copy(), masks_TSS.copy()
    frames_TSSC[window] = other_TSSC[window]
    masks_TSS[window] = False
    return frames_TSSC, masks_TSS


def _degrade(
    random: np.random.Generator, frames_TSSC: np.ndarray, scenery_TSSC: np.ndarray
) -> np.ndarray:
    """Let figures fade into the scenery in places, and blur the frames."""
    num_frames, side = frames_TSSC.shape[:2]
    cell = side / random.uniform(4, 16)
    fading_TSS1 = np.stack(
        [smooth_noise(random, side, side, cell=cell)[..., None] for _ in range(num_frames)]
    )
    shown_TSS1 = np.clip(random.uniform(0.5, 1) + fading_TSS1, 0, 1)
    mixed_TSSC = scenery_TSSC + shown_TSS1 * (frames_TSSC.astype(np.float32) - scenery_TSSC)
    small = round(side / random.uniform(1, 6))
    blurred = [
        Image.fromarray(frame_SSC.astype(np.uint8)).resize((small, small), Image.Resampling.BOX)
        for frame_SSC in mixed_TSSC
    ]
    return np.stack([np.asarray(image.resize((side, side))) for image in blurred])


def points_of(
    random: np.random.Generator, masks_BSS: np.ndarray, kind: PromptKind
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a box or points for every mask.

    Args:
        random: Random generator.
        masks_BSS: bool, not empty.
        kind: Any but `mask`.

    Returns:
        x, y in pixels of the square, float32 [B, P, 2], and SAM2's labels, int32 [B, P].
    """
    if kind == "box":
        return np.stack([_box(random, mask_SS) for mask_SS in masks_BSS]), _labels(masks_BSS, 2, 3)
    count = 1 if kind == "point" else 3
    points = []
    for mask_SS in masks_BSS:
        y_N, x_N = np.nonzero(mask_SS)
        chosen = random.integers(len(y_N), size=count)
        points.append(np.stack([x_N[chosen], y_N[chosen]], axis=-1) + 0.5)
    return np.stack(points).astype(np.float32), _labels(masks_BSS, *[1] * count)


def _box(random: np.random.Generator, mask_SS: np.ndarray) -> np.ndarray:
    y_N, x_N = np.nonzero(mask_SS)
    low, high = np.array([x_N.min(), y_N.min()]), np.array([x_N.max(), y_N.max()]) + 1
    corners_22 = np.stack([low, high]) + random.normal(0, _BOX_NOISE, (2, 2)) * (high - low)
    return np.clip(corners_22, 0, len(mask_SS)).astype(np.float32)


def _labels(masks_BSS: np.ndarray, *labels: int) -> np.ndarray:
    return np.tile(np.array(labels, dtype=np.int32), (len(masks_BSS), 1))
