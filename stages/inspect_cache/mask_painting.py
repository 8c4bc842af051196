"""Masks and prompts painted onto a frame; used by `overlay_picture`."""

# Legend: H W pixels of the frame, h w of a stored mask.

import numpy as np
from PIL import Image, ImageDraw

from stages.clips import SubjectPrompt
from stages.inspect_cache.lettering import Colour

_HALF = 128
"""Stored masks are 255 times a probability: from here on a pixel is more likely in than out."""
_HALO: Colour = (0, 0, 0)


def mask_at_size(mask_hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where a stored mask (uint8, 255 times a probability) is over a half: bool [height, width].

    Args:
        mask_hw: at any size; it spans the same picture.
        size: width and height wanted, in pixels; resampled bilinearly before the threshold.
    """
    resized = Image.fromarray(mask_hw).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized) >= _HALF


def outline(mask_HW: np.ndarray, thickness: int) -> np.ndarray:
    """The mask's pixels within `thickness` of one outside it; the frame's edge is no outside."""
    return mask_HW & _grown(~mask_HW, thickness)


def checks(shape: tuple[int, int], side: int) -> np.ndarray:
    """Squares of `side` pixels, half of them true, so that a line in any direction meets both.

    A chessboard whose blocks of two by two are flipped at random, the same way every time: stripes
    and a plain chessboard are all one along some diagonals.
    """
    y_H, x_W = (np.arange(length) // side for length in shape)
    blocks = (y_H.max() // 2 + 1, x_W.max() // 2 + 1)
    flipped = np.random.default_rng(0).integers(0, 2, blocks)
    flipped_HW = flipped[(y_H // 2)[:, None], (x_W // 2)[None]]
    return (x_W[None] + y_H[:, None] + flipped_HW) % 2 == 0


def tinted(
    image_HW3: np.ndarray, region_HW: np.ndarray, colour: Colour, share: float
) -> np.ndarray:
    """A uint8 image whose `region_HW` is mixed with `share` (0 to 1) of a colour."""
    painted_HW3 = image_HW3.copy()
    mixed_N3 = (1 - share) * image_HW3[region_HW] + share * np.array(colour)
    painted_HW3[region_HW] = mixed_N3.round()
    return painted_HW3


def outlined(
    image_HW3: np.ndarray, mask_HW: np.ndarray, colour: Colour, thickness: int
) -> np.ndarray:
    """A uint8 image with the mask's outline in a colour, and a dark rim around it."""
    rim_HW = _grown(mask_HW, 1) & ~mask_HW
    return tinted(tinted(image_HW3, rim_HW, _HALO, 0.6), outline(mask_HW, thickness), colour, 1.0)


def _grown(mask_HW: np.ndarray, reach: int) -> np.ndarray:
    """The mask and every pixel within `reach` of it, along either axis or both."""
    for axis in (0, 1):
        source, grown = mask_HW.swapaxes(0, axis), mask_HW.copy()
        target = grown.swapaxes(0, axis)
        for shift in range(1, min(reach, len(source) - 1) + 1):
            target[shift:] |= source[:-shift]
            target[:-shift] |= source[shift:]
        mask_HW = grown
    return mask_HW


def prompt_painted(
    image_HW3: np.ndarray,
    prompt: SubjectPrompt,
    colour: Colour,
    *,
    scale: tuple[float, float],
    thickness: int,
) -> np.ndarray:
    """A uint8 image with a prompt: a box's edges, points as discs (crosses off the subject), or a
    mask's outline.

    Args:
        prompt: in training-frame pixels.
        scale: pixels of the image per training-frame pixel, to the right and down.
    """
    height, width, _ = image_HW3.shape
    if prompt.mask_HW is not None:
        mask_HW = mask_at_size(prompt.mask_HW.astype(np.uint8) * 255, (width, height))
        return outlined(image_HW3, mask_HW, colour, thickness)
    image = Image.fromarray(image_HW3)
    pen = ImageDraw.Draw(image)
    if prompt.box_xyxy is not None:
        corners = np.array(prompt.box_xyxy).reshape(2, 2) * scale
        (x0, y0), (x1, y1) = np.clip(corners, 0, (width - 1, height - 1)).tolist()
        for grown, ink in ((1, _HALO), (0, colour)):
            edges = (x0 - grown, y0 - grown, x1 + grown, y1 + grown)
            pen.rectangle(edges, outline=ink, width=thickness + 2 * grown)
    else:
        assert prompt.points_xy is not None and prompt.point_labels is not None
        for (x, y), label in zip(prompt.points_xy * scale, prompt.point_labels, strict=True):
            _point(pen, x, y, colour if label else None, 3 * thickness)
    return np.asarray(image)


def _point(pen: ImageDraw.ImageDraw, x: float, y: float, colour: Colour | None, size: int) -> None:
    """A disc with a dark rim, or without a colour a cross."""
    box = (x - size, y - size, x + size, y + size)
    if colour is not None:
        pen.ellipse(box, fill=colour, outline=_HALO, width=max(1, size // 3))
        return
    for ends in (box, (box[0], box[3], box[2], box[1])):
        pen.line(ends, fill=_HALO, width=max(2, size // 2))
