"""Draw clips of a store, each as an image and a video.

Teacher stores show features as colours and the implied flow, gram_flow stores the flow, latents
stores the posterior mean. Masks are drawn over their frames by `overlay`; text is not drawn.
"""

# Legend: T moment in the store (frame or latent frame), H W grid, C channel.

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from cache_schema import ClipEntry, StoreReader
from stages.clips import ClipDataset, ClipsConfig
from stages.clips.fingerprints import video_hash_in
from stages.inspect_cache.clip_view import ClipView, read_clip
from stages.inspect_cache.colours import flow_colours
from stages.inspect_cache.drawing import (
    DEFAULT_FPS,
    DPI,
    FAINT,
    INK,
    TEXT_SIZE,
    WARNING,
    Drawing,
    FileStems,
    load_source_clip,
    mark_invalid,
    panel_figure,
    panel_size,
    spread_moments,
    write_drawing,
)
from stages.progress import Progress

DRAWN_KINDS = ("teacher", "gram_flow", "latents")
"""Kinds of stores that can be drawn."""

_MAX_ROWS = 6
_LONG_SIDE = 2.25
_LABELS_WIDTH, _LEGEND_WIDTH, _WHEEL = 0.62, 1.4, 0.85
"""In inches, as is `_LONG_SIDE` of a panel."""
_MIN_ARROW = 0.11
"""In inches: on finer grids, arrows are drawn for some tokens only."""


def draw_store(
    reader: StoreReader,
    keys: Sequence[str],
    *,
    out_dir: Path,
    clips: ClipsConfig,
    dataset: ClipDataset | None,
    radius: int,
    temperature: float,
    progress: Progress,
) -> Iterator[Drawing]:
    """Draw clips of a store: rows of frames, features as colours, implied flow.

    Args:
        reader: The store.
        keys: Keys of the clips.
        out_dir: Folder for `<clip>.png` and `<clip>.mp4`; created if missing.
        clips: Length, size and frame rate of the clips, as at extraction.
        dataset: Source of the frames; None omits their column.
        radius: Half the window of the flow, in tokens; limited to the stored window.
        temperature: Softmax temperature of the flow.
        progress: Advanced once per clip.

    Raises:
        CacheError: No such clip, or one that fails its checks.
        ValueError: A store that cannot be drawn, or whose clips do not match `clips`.
    """
    kind = reader.settings.kind
    if kind not in DRAWN_KINDS:
        drawn = " or ".join(DRAWN_KINDS)
        raise ValueError(
            f"{reader.path} is a {kind} store, which cannot be drawn by itself; draw a {drawn} "
            "store, or a masks store over its frames with inspect --overlay"
        )
    stems = FileStems(reader.keys)
    with progress.task("draw", len(keys), unit="clips") as task:
        for entry in map(reader.record, keys):
            view = read_clip(reader, entry.key, clips, radius=radius, temperature=temperature)
            notes, frames_THWC = _frames(dataset, clips, entry, view.grid)
            title = f"{entry.key} in {reader.name}"
            stem = stems.of(entry.key)
            drawing = Drawing(
                key=entry.key,
                picture=out_dir / f"{stem}.png",
                video=out_dir / f"{stem}.mp4",
                notes=(*notes, *view.notes),
            )
            moments = spread_moments(view.num_drawn, _MAX_ROWS)
            write_drawing(
                drawing,
                view_figure(view, moments, title, frames_THWC),
                (view_figure(view, [t], title, frames_THWC) for t in range(view.num_drawn)),
                (clips.fps or DEFAULT_FPS) * len(view.frames) / clips.num_frames,
            )
            task.advance()
            yield drawing


def _frames(
    dataset: ClipDataset | None, clips: ClipsConfig, entry: ClipEntry, grid: tuple[int, int]
) -> tuple[tuple[str, ...], np.ndarray | None]:
    found = load_source_clip(
        dataset, clips, shard=entry.shard, key=entry.key, video=video_hash_in(entry.fingerprint)
    )
    if isinstance(found, str):
        return (f"no frames: {found}",), None
    height, width = found.frames_THWC.shape[1:3]
    if height * grid[1] != width * grid[0]:
        return (
            f"no frames: {width}x{height} does not have the aspect ratio of the store's grid",
        ), None
    return (), found.frames_THWC


def view_figure(
    view: ClipView, moments: Sequence[int], title: str, frames_THWC: np.ndarray | None
) -> Figure:
    """Draw one row per moment: its frame, principal components and implied flow, and the legend.

    Args:
        view: What the store holds; columns without data are omitted.
        moments: Indices of the moments.
        title: Printed above.
        frames_THWC: uint8, every frame of the clip, or None.
    """
    columns = {
        "frame": frames_THWC,
        "principal components as RGB": view.colours_THWC,
        "implied flow to the next frame": view.flow_PHW2,
    }
    shown = {name: values for name, values in columns.items() if values is not None}
    has_flow = view.flow_PHW2 is not None
    size = panel_size(view.grid[1], view.grid[0], _LONG_SIDE)
    figure, axes = panel_figure(
        title,
        "",
        (len(moments), len(shown)),
        size,
        left=_LABELS_WIDTH,
        right=_LEGEND_WIDTH if has_flow else 0.0,
        below=max(0.0, _LEGEND_WIDTH - len(moments) * size[1]) if has_flow else 0.0,
    )
    for panel, name in zip(axes[0], shown, strict=True):
        panel.set_title(name, loc="left", fontsize=TEXT_SIZE, color=FAINT, pad=4)
    for row, moment in zip(axes, moments, strict=True):
        valid = bool(view.valid_T[moment])
        row[0].set_ylabel(
            f"frame {view.frames[moment]}" + ("" if valid else "\nnot valid"),
            fontsize=TEXT_SIZE,
            color=FAINT if valid else WARNING,
            rotation="horizontal",
            horizontalalignment="right",
            verticalalignment="center",
        )
        for panel, (name, values) in zip(row, shown.items(), strict=True):
            if name == "frame":
                panel.imshow(values[view.frames[moment]], aspect="auto")
            elif values is view.flow_PHW2:
                draw_flow(panel, values[moment], view.largest_flow, size[0])
            else:
                panel.imshow(values[moment], aspect="auto", interpolation="nearest")
            if not valid:
                mark_invalid(panel)
    if has_flow:
        _draw_legend(axes[0][-1], size, view.largest_flow)
    return figure


def draw_flow(panel: Axes, flow_HW2: np.ndarray, largest: float, width: float) -> None:
    """Draw a flow field: a colour per token, and arrows of its direction and length.

    Args:
        panel: Axes to draw on.
        flow_HW2: (dx, dy) in tokens.
        largest: The length in tokens of a full arrow, and of full saturation.
        width: Of the axes, in inches.
    """
    panel.imshow(flow_colours(flow_HW2, largest), aspect="auto", interpolation="nearest")
    stride = math.ceil(_MIN_ARROW * flow_HW2.shape[1] / width)
    margin = stride // 2  # arrows are `stride` tokens long
    y_N, x_N = (
        np.arange(min(margin, length - 1), max(length - margin, margin + 1), stride)
        for length in flow_HW2.shape[:2]
    )
    y, x = np.meshgrid(y_N, x_N, indexing="ij")
    arrows_N2 = flow_HW2[y, x].reshape(-1, 2) / largest
    arrows_N2 /= np.maximum(np.hypot(*arrows_N2.T), 1.0)[:, None]
    panel.quiver(
        x.ravel(),
        y.ravel(),
        *arrows_N2.T,
        angles="xy",
        scale_units="xy",
        scale=1 / (0.9 * stride),
        units="xy",
        width=0.06 * stride,
        headwidth=4.5,
        headlength=4.5,
        headaxislength=4.5,
        minshaft=2,
        minlength=1.5,
        pivot="middle",
        color=INK,
    )


def _draw_legend(panel: Axes, size: tuple[float, float], largest: float) -> None:
    """Draw the colour wheel to the right of a panel of `size`, with a scale in tokens."""
    left = 1 + (_LEGEND_WIDTH - _WHEEL) / 2 / size[0]
    width, height = _WHEEL / size[0], _WHEEL / size[1]
    wheel = panel.inset_axes((left, 1 - height, width, height))
    axis = np.linspace(-1, 1, round(2 * _WHEEL * DPI))
    colours = flow_colours(np.stack(np.meshgrid(axis, axis), axis=-1), 1.0)
    image = wheel.imshow(colours, extent=(-1, 1, 1, -1))
    image.set_clip_path(Circle((0, 0), 1, transform=wheel.transData))
    wheel.set_axis_off()
    wheel.set_title("flow", fontsize=TEXT_SIZE, color=FAINT, pad=4)
    lines = ("hue: direction", "rim and full arrow:", f"{largest:.2f} tokens", "white: no motion")
    wheel.text(
        0,
        1.12,
        "\n".join(lines),
        fontsize=TEXT_SIZE,
        color=FAINT,
        linespacing=1.4,
        horizontalalignment="center",
        verticalalignment="top",
    )
