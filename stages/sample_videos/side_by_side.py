"""One video that shows two others side by side, with their names above."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cache_schema.shown_text import visible
from stages.clips import read_video

# Legend: T frame, H W pixels, C colour (RGB).

_GAP = 4
"""Pixels between the videos; even, as H.264 needs."""
_INK, _PAPER = (240, 240, 240), (24, 24, 24)


def side_by_side(
    left_THWC: np.ndarray, right_THWC: np.ndarray, names: tuple[str, str]
) -> np.ndarray:
    """Place two videos of one size and length beside each other: uint8 [T, H + band, 2 W + gap, 3].

    Args:
        left_THWC: uint8 [T, H, W, 3].
        right_THWC: The same shape.
        names: What is written above each.

    Raises:
        ValueError: The shapes differ.
    """
    if left_THWC.shape != right_THWC.shape:
        raise ValueError(
            f"videos of {left_THWC.shape[:3]} and {right_THWC.shape[:3]} frames, height and width "
            "cannot be shown side by side"
        )
    width = left_THWC.shape[2]
    band_HWC = _name_band(names, width)
    bands_THWC = np.broadcast_to(band_HWC, (len(left_THWC), *band_HWC.shape))
    gap_THWC = np.full((*left_THWC.shape[:2], _GAP, 3), _PAPER, np.uint8)
    row_THWC = np.concatenate([left_THWC, gap_THWC, right_THWC], axis=2)
    return np.concatenate([bands_THWC, row_THWC], axis=1)


def _name_band(names: tuple[str, str], width: int) -> np.ndarray:
    """uint8 [band, 2 W + gap, 3]: each name above its video, cut where the video ends."""
    size = max(9, width // 30)
    band = Image.new("RGB", (2 * width + _GAP, 2 * size), _PAPER)
    font = ImageFont.load_default(size)
    for name, left in zip(names, (0, width + _GAP), strict=True):
        label = Image.new("RGB", (width, 2 * size), _PAPER)
        ImageDraw.Draw(label).text((size // 2, size // 3), visible(name), fill=_INK, font=font)
        band.paste(label, (left, 0))
    return np.asarray(band)


def read_side_by_side(left: Path, right: Path, names: tuple[str, str]) -> tuple[np.ndarray, float]:
    """Read two videos and place them side by side: frames as `side_by_side`, frames per second.

    Raises:
        ValueError: They differ in size or length.
        VideoError: One cannot be decoded.
    """
    left_THWC, fps = read_video(left)
    right_THWC, _ = read_video(right)
    return side_by_side(left_THWC, right_THWC, names), fps
