"""A flow field as colours and arrows, and the colour wheel of the legend.

Hue is the direction, saturation the length: white is no motion. All arrows of a clip have the same
scale.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

# Legend: H W token grid; the last axis of a flow is (dx, dy), x to the right, y downwards.

_SUPERSAMPLING = 3
_INK = (20, 20, 20)
_STILL = 0.08
"""Arrows shorter than this fraction of the longest are drawn as a dot."""


def flow_colours(flow_HW2: np.ndarray, largest: float) -> np.ndarray:
    """Colour each vector by direction and length: uint8 [H, W, 3].

    Args:
        flow_HW2: (dx, dy) in any unit.
        largest: the length, in the same unit, drawn at full saturation.
    """
    dx, dy = flow_HW2[..., 0], flow_HW2[..., 1]
    hue = np.mod(np.arctan2(dy, dx) / (2 * np.pi), 1.0)
    saturation = np.clip(np.hypot(dx, dy) / largest, 0.0, 1.0)
    # HSV to RGB with value 1, all six sectors at once.
    sector = np.mod(np.array([5.0, 3.0, 1.0]) + hue[..., None] * 6.0, 6.0)
    ramp = np.clip(np.minimum(sector, 4.0 - sector), 0.0, 1.0)
    return ((1.0 - saturation[..., None] * ramp) * 255).round().astype(np.uint8)


def flow_panel(flow_HW2: np.ndarray, size: tuple[int, int], largest: float) -> Image.Image:
    """Draw a flow field as an image of `size` (width, height): arrows over colours."""
    height, width = flow_HW2.shape[:2]
    large = (size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING)
    image = Image.fromarray(flow_colours(flow_HW2, largest)).resize(large, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    token = (large[0] / width, large[1] / height)
    stride = max(1, math.ceil(14 * _SUPERSAMPLING / min(token)))
    reach = 0.95 * stride * min(token)
    first = (stride - 1) // 2
    for y in range(first, height, stride):
        for x in range(first, width, stride):
            centre = ((x + 0.5) * token[0], (y + 0.5) * token[1])
            vector = flow_HW2[y, x] / largest
            length = float(np.hypot(*vector))
            if length > 1:
                vector = vector / length
            _arrow(pen, centre, (float(vector[0]) * reach, float(vector[1]) * reach), reach)
    return image.resize(size, Image.Resampling.LANCZOS)


def _arrow(
    pen: ImageDraw.ImageDraw,
    centre: tuple[float, float],
    vector: tuple[float, float],
    reach: float,
) -> None:
    length = math.hypot(*vector)
    width = max(1, round(0.06 * reach))
    if length < _STILL * reach:
        box = (centre[0] - width, centre[1] - width, centre[0] + width, centre[1] + width)
        pen.ellipse(box, fill=_INK)
        return
    tail = (centre[0] - vector[0] / 2, centre[1] - vector[1] / 2)
    tip = (centre[0] + vector[0] / 2, centre[1] + vector[1] / 2)
    along = (vector[0] / length, vector[1] / length)
    head = min(0.5 * length, 0.3 * reach)
    base = (tip[0] - along[0] * head, tip[1] - along[1] * head)
    side = (-along[1] * head * 0.55, along[0] * head * 0.55)
    pen.line([tail, base], fill=_INK, width=width)
    left, right = (base[0] + side[0], base[1] + side[1]), (base[0] - side[0], base[1] - side[1])
    pen.polygon([tip, left, right], fill=_INK)


def wheel(diameter: int, background: tuple[int, int, int]) -> Image.Image:
    """Draw the colour wheel: the colour of every direction and length."""
    large = diameter * _SUPERSAMPLING
    image = Image.new("RGB", (large, large), background)
    axis = (np.arange(large) + 0.5) / large * 2 - 1
    dx, dy = np.meshgrid(axis, axis)
    colours = flow_colours(np.stack([dx, dy], axis=-1), 1.0)
    inside = Image.fromarray((np.hypot(dx, dy) <= 1).astype(np.uint8) * 255)
    image.paste(Image.fromarray(colours), (0, 0), inside)
    return image.resize((diameter, diameter), Image.Resampling.LANCZOS)
