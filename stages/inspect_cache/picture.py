"""Layout of a `ClipView`: one image, and the frames of a video."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from stages.inspect_cache.flow_colours import flow_panel, wheel
from stages.inspect_cache.text_layout import FAINT, INK, PAPER, WARNING, font, truncated
from stages.inspect_cache.view import ClipView

_LONG_SIDE = 288
_GAP = 8
_LABELS_WIDTH = 72
_LEGEND_WIDTH = 132
_TITLE_HEIGHT = 34
_CAPTIONS_HEIGHT = 24


def chosen_moments(view: ClipView, rows: int) -> list[int]:
    """Return at most `rows` evenly spaced moments; with a flow, only those that have one."""
    count = len(view.labels) if view.flow_PHW2 is None else len(view.flow_PHW2)
    return sorted({round(moment) for moment in np.linspace(0, count - 1, rows)})


def compose(view: ClipView, moments: Sequence[int]) -> Image.Image:
    """Draw one row per moment with the columns frame, principal components and implied flow, and
    the legend.

    Columns without data are omitted. Height and width are even, as H.264 requires.
    """
    panel_width, panel_height = _panel_size(view.grid)
    captions = _captions(view)
    legend = _LEGEND_WIDTH if view.flow_PHW2 is not None else 0
    width = _LABELS_WIDTH + len(captions) * (panel_width + _GAP) + legend + _GAP
    rows_top = _TITLE_HEIGHT + _CAPTIONS_HEIGHT
    height = rows_top + len(moments) * (panel_height + _GAP) + _GAP
    if legend:
        height = max(height, rows_top + _LEGEND_WIDTH + 60)
    image = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((_GAP, 9), truncated(view.title, width - 2 * _GAP, 16), fill=INK, font=font(16))
    for column, caption in enumerate(captions):
        x = _LABELS_WIDTH + column * (panel_width + _GAP)
        pen.text((x, _TITLE_HEIGHT + 4), caption, fill=FAINT, font=font(13))
    for row, moment in enumerate(moments):
        y = rows_top + row * (panel_height + _GAP)
        middle = y + panel_height / 2
        pen.text((_GAP, middle - 8), view.labels[moment], fill=FAINT, font=font(13))
        if not view.valid_T[moment]:
            pen.text((_GAP, middle + 9), "not valid", fill=WARNING, font=font(13))
        for column, panel in enumerate(_panels(view, moment, (panel_width, panel_height))):
            if not view.valid_T[moment]:
                edge = (0, 0, panel.width - 1, panel.height - 1)
                ImageDraw.Draw(panel).rectangle(edge, outline=WARNING, width=3)
            image.paste(panel, (_LABELS_WIDTH + column * (panel_width + _GAP), y))
    if legend:
        _draw_legend(image, pen, (width - _LEGEND_WIDTH, rows_top), view.largest_flow)
    return image


def compose_video(view: ClipView) -> np.ndarray:
    """Draw each moment as one video frame: uint8 [T, height, width, 3]."""
    moments = chosen_moments(view, len(view.labels))
    return np.stack([np.asarray(compose(view, [moment])) for moment in moments])


def _panel_size(grid: tuple[int, int]) -> tuple[int, int]:
    height, width = grid
    scale = _LONG_SIDE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _captions(view: ClipView) -> list[str]:
    captions = ["frame"] if view.frames_THWC is not None else []
    captions += ["principal components"] if view.colours_THWC is not None else []
    captions += ["implied flow to the next"] if view.flow_PHW2 is not None else []
    return captions


def _panels(view: ClipView, moment: int, size: tuple[int, int]) -> list[Image.Image]:
    panels = []
    if view.frames_THWC is not None:
        frame = Image.fromarray(view.frames_THWC[moment])
        panels.append(frame.resize(size, Image.Resampling.BICUBIC))
    if view.colours_THWC is not None:
        colours = Image.fromarray(view.colours_THWC[moment])
        panels.append(colours.resize(size, Image.Resampling.NEAREST))
    if view.flow_PHW2 is not None:
        panels.append(flow_panel(view.flow_PHW2[moment], size, view.largest_flow))
    return panels


def _draw_legend(
    image: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], largest: float
) -> None:
    diameter = _LEGEND_WIDTH - 4 * _GAP
    x, y = corner[0] + 2 * _GAP, corner[1]
    image.paste(wheel(diameter, PAPER), (x, y))
    middle = x + diameter / 2
    for line, text in enumerate(
        ("hue: direction", "rim, full arrow:", f"{largest:.2f} tokens", "white: still")
    ):
        spot = (middle, y + diameter + 8 + 17 * line)
        pen.text(spot, text, fill=FAINT, font=font(13), anchor="ma")
