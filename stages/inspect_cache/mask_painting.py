"""Drawing masks and prompts on a frame."""

# Legend: H W pixels of the frame, h w of a stored mask.

import numpy as np
from PIL import Image, ImageDraw

from stages.clips import SubjectPrompt
from stages.inspect_cache.text_layout import Colour

_HALF = 128
"""Threshold of a stored mask, which is 255 times a probability: from here on above one half."""
_HALO: Colour = (0, 0, 0)


def resized_mask(mask_hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a stored mask (uint8, 255 times a probability), threshold at 0.5: bool [H, W].

    Args:
        mask_hw: any size; it covers the same frame.
        size: width and height in pixels; resampled bilinearly before the threshold.
    """
    resized = Image.fromarray(mask_hw).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized) >= _HALF


def outline(mask_HW: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of the mask within `thickness` of a pixel outside it; the frame's edge adds none."""
    return mask_HW & _dilated(~mask_HW, thickness)


def checkerboard(shape: tuple[int, int], side: int) -> np.ndarray:
    """Squares of `side` pixels, half of them True, so that a line in any direction crosses both.

    A checkerboard whose 2x2 blocks are flipped at random with a fixed seed: stripes and a plain
    checkerboard are constant along some diagonals.
    """
    y_H, x_W = (np.arange(length) // side for length in shape)
    blocks = (y_H.max() // 2 + 1, x_W.max() // 2 + 1)
    flipped = np.random.default_rng(0).integers(0, 2, blocks)
    flipped_HW = flipped[(y_H // 2)[:, None], (x_W // 2)[None]]
    return (x_W[None] + y_H[:, None] + flipped_HW) % 2 == 0


def tint(
    image_HW3: np.ndarray, region_HW: np.ndarray, colour: Colour, opacity: float
) -> np.ndarray:
    """Blend a colour into `region_HW` of a uint8 image, with an opacity from 0 to 1."""
    painted_HW3 = image_HW3.copy()
    mixed_N3 = (1 - opacity) * image_HW3[region_HW] + opacity * np.array(colour)
    painted_HW3[region_HW] = mixed_N3.round()
    return painted_HW3


def draw_outline(
    image_HW3: np.ndarray, mask_HW: np.ndarray, colour: Colour, thickness: int
) -> np.ndarray:
    """Draw the mask's outline in a colour, with a dark rim around it, on a uint8 image."""
    rim_HW = _dilated(mask_HW, 1) & ~mask_HW
    return tint(tint(image_HW3, rim_HW, _HALO, 0.6), outline(mask_HW, thickness), colour, 1.0)


def _dilated(mask_HW: np.ndarray, reach: int) -> np.ndarray:
    """Dilate a mask by a square of `reach` pixels in each direction."""
    for axis in (0, 1):
        source, dilated = mask_HW.swapaxes(0, axis), mask_HW.copy()
        target = dilated.swapaxes(0, axis)
        for shift in range(1, min(reach, len(source) - 1) + 1):
            target[shift:] |= source[:-shift]
            target[:-shift] |= source[shift:]
        mask_HW = dilated
    return mask_HW


def draw_prompt(
    image_HW3: np.ndarray,
    prompt: SubjectPrompt,
    colour: Colour,
    *,
    scale: tuple[float, float],
    thickness: int,
) -> np.ndarray:
    """Draw a prompt on a uint8 image: a box's edges, points as discs (crosses off the subject), or
    a mask's outline.

    Args:
        prompt: in training-frame pixels.
        scale: image pixels per training-frame pixel, in x and y.
    """
    height, width, _ = image_HW3.shape
    if prompt.mask_HW is not None:
        mask_HW = resized_mask(prompt.mask_HW.astype(np.uint8) * 255, (width, height))
        return draw_outline(image_HW3, mask_HW, colour, thickness)
    image = Image.fromarray(image_HW3)
    pen = ImageDraw.Draw(image)
    if prompt.box_xyxy is not None:
        corners = np.array(prompt.box_xyxy).reshape(2, 2) * scale
        (x0, y0), (x1, y1) = np.clip(corners, 0, (width - 1, height - 1)).tolist()
        for margin, ink in ((1, _HALO), (0, colour)):
            edges = (x0 - margin, y0 - margin, x1 + margin, y1 + margin)
            pen.rectangle(edges, outline=ink, width=thickness + 2 * margin)
    else:
        assert prompt.points_xy is not None and prompt.point_labels is not None
        for (x, y), label in zip(prompt.points_xy * scale, prompt.point_labels, strict=True):
            _point(pen, x, y, colour if label else None, 3 * thickness)
    return np.asarray(image)


def _point(pen: ImageDraw.ImageDraw, x: float, y: float, colour: Colour | None, size: int) -> None:
    """Draw a disc with a dark rim, or a cross if there is no colour."""
    box = (x - size, y - size, x + size, y + size)
    if colour is not None:
        pen.ellipse(box, fill=colour, outline=_HALO, width=max(1, size // 3))
        return
    for ends in (box, (box[0], box[3], box[2], box[1])):
        pen.line(ends, fill=_HALO, width=max(2, size // 2))
