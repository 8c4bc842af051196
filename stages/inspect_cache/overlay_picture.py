"""Layout of mask overlays: a contact sheet, and the frames of a video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from stages.clips import SubjectPrompt
from stages.inspect_cache.mask_painting import (
    checkerboard,
    draw_outline,
    draw_prompt,
    outline,
    resized_mask,
    tint,
)
from stages.inspect_cache.text_layout import (
    FAINT,
    INK,
    PAPER,
    WARNING,
    Colour,
    font,
    truncated,
    wrapped,
)

# Legend: T frame, H W pixels of the training frame, h w of a stored mask.

# Colours that are rare in natural scenes and distinguishable for colour-blind people.
FORWARD: Colour = (255, 40, 200)
BACKWARD: Colour = (0, 225, 255)
PROMPT: Colour = (255, 240, 60)
_BOTH: Colour = (128, 132, 228)
"""The mean of the two tracks' colours."""
_TINT_OPACITY = 0.35
_DIM_OPACITY = 0.55
_GAP = 8
_COLUMNS = 4
_PANEL_LONG_SIDE = 320
_VIDEO_LONG_SIDE = 480
"""Smaller clips are enlarged by an integer factor, so that lines and text stay thin."""
_TITLE, _TEXT, _LABEL = 16, 13, 14
"""Font sizes in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OverlayView:
    """Frames and tracks of a clip to draw; all arrays have the same T."""

    title: str
    facts: tuple[str, ...]
    """Printed under the title."""
    frames_THW3: np.ndarray
    """uint8, the training frames."""
    forward_Thw: np.ndarray
    """uint8, 255 times the probability of the forward track."""
    backward_Thw: np.ndarray | None
    valid_T: np.ndarray
    """bool."""
    prompts: Mapping[int, Sequence[SubjectPrompt]]
    """In training-frame pixels, by frame."""

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of the training frames."""
        return self.frames_THW3.shape[2], self.frames_THW3.shape[1]


def sheet_moments(num_frames: int, wanted: int, required: Sequence[int]) -> list[int]:
    """At most `wanted` frames, evenly spaced, adjusted to include the `required` ones."""
    moments = {round(moment) for moment in np.linspace(0, num_frames - 1, wanted)}
    pinned: set[int] = set()
    for frame in required[:wanted]:
        if frame not in moments and moments - pinned:
            moments.remove(min(moments - pinned, key=lambda moment: abs(moment - frame)))
        moments.add(frame)
        pinned.add(frame)
    return sorted(moments)


def compose_sheet(view: OverlayView, moments: Sequence[int]) -> Image.Image:
    """Draw the title, the frames of `moments` in rows of four, and the legend."""
    panels = [
        _panel(view, moment, _scaled(view.frame_size, _PANEL_LONG_SIDE)) for moment in moments
    ]
    return _framed(view, panels, min(_COLUMNS, len(panels)))


def compose_overlay_video(view: OverlayView) -> np.ndarray:
    """Draw every frame under the title: uint8 [T, height, width, 3], even height and width."""
    size = view.frame_size
    enlarged = max(1, _VIDEO_LONG_SIDE // max(size))
    shown = size[0] * enlarged, size[1] * enlarged
    moments = range(len(view.frames_THW3))
    return np.stack([np.asarray(_framed(view, [_panel(view, m, shown)], 1)) for m in moments])


def _scaled(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    scale = long_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _panel(view: OverlayView, moment: int, size: tuple[int, int]) -> Image.Image:
    """Draw one frame with masks, prompts, frame number, and a warning if it is not valid."""
    frame = Image.fromarray(view.frames_THW3[moment]).resize(size, Image.Resampling.BICUBIC)
    image_HW3 = np.asarray(frame)
    valid = bool(view.valid_T[moment])
    if not valid:
        image_HW3 = tint(image_HW3, np.ones(image_HW3.shape[:2], bool), INK, _DIM_OPACITY)
    thickness = max(2, round(max(size) / 240))
    forward_HW = resized_mask(view.forward_Thw[moment], size)
    if view.backward_Thw is None:
        image_HW3 = tint(image_HW3, forward_HW, FORWARD, _TINT_OPACITY)
        image_HW3 = draw_outline(image_HW3, forward_HW, FORWARD, thickness)
    else:
        backward_HW = resized_mask(view.backward_Thw[moment], size)
        image_HW3 = _both_tracks(image_HW3, forward_HW, backward_HW, thickness)
    prompts = view.prompts.get(moment, ())
    scale = size[0] / view.frame_size[0], size[1] / view.frame_size[1]
    for prompt in prompts:
        image_HW3 = draw_prompt(image_HW3, prompt, PROMPT, scale=scale, thickness=thickness)
    image = Image.fromarray(image_HW3)
    _label(image, moment, valid=valid, prompted=bool(prompts), thickness=2 * thickness)
    return image


def _both_tracks(
    image_HW3: np.ndarray, forward_HW: np.ndarray, backward_HW: np.ndarray, thickness: int
) -> np.ndarray:
    """Draw both masks so that neither hides the other; coinciding outlines alternate colours."""
    for region_HW, colour in (
        (forward_HW & ~backward_HW, FORWARD),
        (backward_HW & ~forward_HW, BACKWARD),
        (forward_HW & backward_HW, _BOTH),
    ):
        image_HW3 = tint(image_HW3, region_HW, colour, _TINT_OPACITY)
    image_HW3 = draw_outline(image_HW3, forward_HW, FORWARD, thickness)
    image_HW3 = draw_outline(image_HW3, backward_HW, BACKWARD, thickness)
    shared_HW = outline(forward_HW, thickness) & outline(backward_HW, thickness)
    return tint(image_HW3, shared_HW & checkerboard(shared_HW.shape, 3 * thickness), FORWARD, 1.0)


def _label(image: Image.Image, moment: int, *, valid: bool, prompted: bool, thickness: int) -> None:
    pen = ImageDraw.Draw(image)
    if not valid:
        pen.rectangle((0, 0, image.width - 1, image.height - 1), outline=WARNING, width=thickness)
    text = f"frame {moment}" + (", prompt" if prompted else "") + ("" if valid else ", not valid")
    text = truncated(text, image.width - 12, _LABEL)
    box = pen.textbbox((6, 4), text, font=font(_LABEL))
    pen.rectangle((box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3), fill=INK if valid else WARNING)
    pen.text((6, 4), text, fill=PAPER, font=font(_LABEL))


def _framed(view: OverlayView, panels: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange panels in rows between title and legend; the size is even, as H.264 requires."""
    panel_width, panel_height = panels[0].size
    rows = -(-len(panels) // columns)
    width = columns * (panel_width + _GAP) + _GAP
    inner = width - 2 * _GAP
    facts = wrapped(view.facts, inner, _TEXT)
    legend = _legend(view, inner)
    top = 34 + 18 * len(facts) + _GAP
    below = top + rows * (panel_height + _GAP)
    height = below + legend.height + _GAP
    image = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((_GAP, 9), truncated(view.title, inner, _TITLE), fill=INK, font=font(_TITLE))
    for line, text in enumerate(facts):
        pen.text((_GAP, 34 + 18 * line), text, fill=FAINT, font=font(_TEXT))
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        corner = _GAP + column * (panel_width + _GAP), top + row * (panel_height + _GAP)
        image.paste(panel, corner)
    image.paste(legend, (_GAP, below))
    return image


def _legend(view: OverlayView, width: int) -> Image.Image:
    """Draw the legend of the colours, in as many lines as needed."""
    entries = [("forward track", FORWARD)]
    if view.backward_Thw is not None:
        entries += [("backward track", BACKWARD), ("both: outlines alternate", _BOTH)]
    entries += [("prompt", PROMPT)] if view.prompts else []
    entries += [] if view.valid_T.all() else [("not valid: masked out in training", WARNING)]
    places: list[tuple[int, int, str, Colour]] = []
    x = line = 0
    for text, colour in entries:
        text = truncated(text, width - 18, _TEXT)
        needed = 18 + round(font(_TEXT).getlength(text))
        if x and x + needed > width:
            x, line = 0, line + 1
        places.append((x, 20 * line, text, colour))
        x += needed + 16
    image = Image.new("RGB", (width, 20 * (line + 1)), PAPER)
    pen = ImageDraw.Draw(image)
    for x, y, text, colour in places:
        pen.rectangle((x, y + 3, x + 12, y + 15), fill=colour, outline=INK)
        pen.text((x + 18, y + 1), text, fill=FAINT, font=font(_TEXT))
    return image
