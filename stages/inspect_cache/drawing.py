"""What pictures of clips share: the source's frames, figures of panels, and output files."""

import hashlib
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from cache_schema.atomic_io import write_atomic
from cache_schema.shown_text import visible
from stages.clips import (
    Clip,
    ClipDataset,
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    input_shard_name,
    load_clip,
    write_video,
)
from stages.clips.fingerprints import hash_video

# Legend: T frame of the video, H W pixels of the picture. Lengths are in inches.

DEFAULT_FPS = 8.0
"""CogVideoX 1.0's frame rate, used if the clips keep their own rate."""
DPI = 128
"""A power of two, so that whole pixels stay whole as inches."""
INK, FAINT, WARNING = "#1e1e1e", "#6e6e6e", "#c81e1e"
"""Colours of text; the last marks frames that are not valid."""
TEXT_SIZE = 7.5
"""In points."""

_TITLE_SIZE = 9.0
_TITLE_FONT = "DejaVu Sans Mono"
"""Comes with matplotlib; every character has the same width."""
_EM_PER_CHAR = 0.64
"""With the rounding of advances to whole pixels."""
_LINE_HEIGHT = 1.3
_MARGIN = 0.08
_MIN_PANEL_WIDTH = 1.6
_MAX_STEM_CHARS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Paths of a clip's image and video, and notes on what they lack."""

    key: str
    picture: Path
    video: Path
    notes: tuple[str, ...]


class FileStems:
    """Unique file names for clips, without path separators."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Find the keys of a store whose readable names collide."""
        seen: set[str] = set()
        self._shared: set[str] = set()
        for readable in map(_readable, keys):
            (self._shared if readable in seen else seen).add(readable)

    def of(self, key: str) -> str:
        """The clip's file name, with a hash of the key if another clip has the same one."""
        readable = _readable(key)
        if readable in self._shared:
            return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        return readable


def _readable(key: str) -> str:
    return re.sub(r"[^\w.-]+", "-", key).strip("-.")[:_MAX_STEM_CHARS] or "clip"


def write_drawing(drawing: Drawing, picture: Figure, video: Iterable[Figure], fps: float) -> None:
    """Write both files, each atomically.

    Args:
        drawing: the paths; the folder is created if missing.
        picture: written as PNG.
        video: one figure per frame, all of the same size.
        fps: frames per second of the video.
    """
    drawing.picture.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    picture.savefig(png, format="png", dpi=DPI)
    temporary = drawing.picture.with_name(f"{drawing.picture.name}.part")
    write_atomic(drawing.picture, png.getvalue(), temporary=temporary)
    write_video(drawing.video, np.stack([pixels(figure) for figure in video]), fps)


def pixels(figure: Figure) -> np.ndarray:
    """Render a figure: uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def load_source_clip(
    dataset: ClipDataset | None, clips: ClipsConfig, *, shard: str, key: str, video: str | None
) -> Clip | str:
    """Decode the source of a stored clip, or return why that is not possible.

    Args:
        dataset: The dataset; None if there is none.
        clips: Length, size and frame rate to decode to.
        shard: Name of the clip's shard in the store, possibly a retry shard.
        key: The clip's key.
        video: Hash of the video that the clip was extracted from; None for a skipped clip.
    """
    if dataset is None:
        return f"no dataset at {clips.path}"
    name = input_shard_name(shard, dataset)
    for candidate in (candidate for candidate in dataset.shards if candidate.name == name):
        for record in candidate.records():
            if record.key == key and isinstance(record, ClipRecord):
                try:
                    found = load_clip(record, clips)
                except ClipSkipped as problem:
                    return f"the dataset's clip can no longer be read ({problem})"
                if video not in (None, hash_video(record.video)):
                    return (
                        "the dataset's video of this clip is another one than the store was made "
                        "from; sam2vx-pipeline extract-features --refresh-changed extracts it again"
                    )
                return found
    return f"the dataset at {clips.path} has no clip {key!r} in shard {name or shard}"


def spread_moments(count: int, wanted: int, required: Sequence[int] = ()) -> list[int]:
    """At most `wanted` of `count` moments, evenly spaced, adjusted to include the required ones."""
    moments = {round(moment) for moment in np.linspace(0, count - 1, wanted)}
    pinned: set[int] = set()
    for moment in required[:wanted]:
        if moment not in moments and moments - pinned:
            moments.remove(min(moments - pinned, key=lambda other: abs(other - moment)))
        moments.add(moment)
        pinned.add(moment)
    return sorted(moments)


def panel_size(width: int, height: int, long_side: float) -> tuple[float, float]:
    """Width and height of a panel of the given aspect ratio, wide enough for its caption."""
    scale = max(long_side / max(width, height), _MIN_PANEL_WIDTH / width)
    return width * scale, height * scale


def panel_figure(
    title: str,
    facts: str,
    panels: tuple[int, int],
    size: tuple[float, float],
    *,
    gap: float = 0.06,
    left: float = 0.0,
    right: float = 0.0,
    below: float = 0.0,
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of equal panels without ticks, under a title; its size in pixels is even.

    Args:
        title: Wrapped to the figure's width; characters without a glyph are escaped.
        facts: A smaller text under the title; may be empty.
        panels: Number of rows and columns.
        size: Width and height of a panel.
        gap: Between rows, in which their panels' titles stand.
        left: Space for labels, beside the usual margin; so are `right` and `below`.

    Returns:
        The figure, and the axes of each row.
    """
    rows, columns = panels
    width = _even(columns * (size[0] + _MARGIN) + _MARGIN + left + right)
    inner = width - 2 * _MARGIN
    lines = [
        (_fitted(text, inner, points), points, colour)
        for text, points, colour in ((title, _TITLE_SIZE, INK), (facts, TEXT_SIZE, FAINT))
    ]
    heights = [len(text) * points * _LINE_HEIGHT / 72 for text, points, _ in lines]
    top = _MARGIN + sum(heights) + 0.24
    height = _even(top + rows * (size[1] + gap) - gap + below + _MARGIN)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="#fafaf8")
    y = height - _MARGIN
    for (text, points, colour), needed in zip(lines, heights, strict=True):
        figure.text(
            _MARGIN / width,
            y / height,
            "\n".join(text),
            fontfamily=_TITLE_FONT,
            fontsize=points,
            color=colour,
            verticalalignment="top",
            parse_math=False,
        )
        y -= needed
    grid = figure.add_gridspec(
        rows,
        columns,
        left=(_MARGIN + left) / width,
        right=(_MARGIN + left + columns * (size[0] + _MARGIN) - _MARGIN) / width,
        top=1 - top / height,
        bottom=1 - (top + rows * (size[1] + gap) - gap) / height,
        wspace=_MARGIN / size[0],
        hspace=gap / size[1],
    )
    axes = [
        [figure.add_subplot(grid[row, column]) for column in range(columns)] for row in range(rows)
    ]
    for panel in (panel for of_row in axes for panel in of_row):
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure, axes


def mark_invalid(panel: Axes) -> None:
    """Draw the frame of a panel whose moment training masks out."""
    panel.spines[:].set(visible=True, color=WARNING, linewidth=2.5)


def _even(inches: float) -> float:
    """Round up to an even number of pixels, which H.264 requires."""
    return float(np.ceil(inches * DPI / 2)) * 2 / DPI


def _fitted(text: str, width: float, points: float) -> list[str]:
    """Wrap a text to `width`, at most six lines; characters that the font lacks are escaped."""
    font = get_font(findfont(_TITLE_FONT))
    shown = "".join(
        char if font.get_char_index(ord(char)) else char.encode("unicode_escape").decode()
        for char in visible(text)
    )
    return textwrap.wrap(
        shown, max(8, int(width * 72 / (points * _EM_PER_CHAR))), max_lines=6, placeholder=" …"
    )
