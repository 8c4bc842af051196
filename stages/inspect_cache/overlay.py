"""Draw the masks of a store over the clips' frames, as a contact sheet and a video."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke

from cache_schema import ClipEntry, StoreReader
from stages.clips import Clip, ClipDataset, ClipsConfig, SubjectPrompt
from stages.clips.fingerprints import video_hash_in
from stages.inspect_cache.clip_facts import describe_track
from stages.inspect_cache.drawing import (
    DEFAULT_FPS,
    DPI,
    FAINT,
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

# Legend: T frame, H W pixels of the training frame, h w of a stored mask.

# Colours that are rare in natural scenes and distinguishable for colour-blind people.
FORWARD, BACKWARD, PROMPT = "#ff28c8", "#00e1ff", "#fff03c"
_HALF = 127.5
"""A stored mask is 255 times a probability: this is one half."""
_SHEET_FRAMES, _SHEET_COLUMNS = 8, 4
_SHEET_PANEL = 2.5
"""Long side in inches."""
_VIDEO_LONG_SIDE = 480
"""In pixels; smaller clips are enlarged by an integer factor, so that lines and text stay thin."""
_LEGEND_COLUMN = 2.3
"""Width in inches."""
_GREY = 128
_DASHED = (0, (2.0, 2.0))
_RIM: list[AbstractPathEffect] = [withStroke(linewidth=2.6, foreground="#00000099")]
_EDGES = ("white", "black")
"""Of points off the subject and on it."""


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


def draw_overlay(
    reader: StoreReader,
    keys: Sequence[str],
    *,
    out_dir: Path,
    clips: ClipsConfig,
    dataset: ClipDataset | None,
    progress: Progress,
) -> Iterator[Drawing]:
    """Draw tracked masks over the frames of their clips.

    Each direction's mask is tinted and outlined in its colour; the backward outline is dashed, so
    that both are seen where they coincide. Frames that are not valid are dimmed and framed; prompts
    are drawn on their frame.

    Args:
        reader: A masks store.
        keys: Keys of the clips.
        out_dir: Folder for `<clip>.overlay.png` and `<clip>.overlay.mp4`; created if missing.
        clips: Length, size and frame rate of the clips, as at extraction.
        dataset: Source of the frames; None draws the masks on grey.
        progress: Advanced once per clip.

    Raises:
        CacheError: No such clip, or one that fails its checks.
        ValueError: A store of another kind, or whose clips do not match `clips`.
    """
    kind = reader.settings.kind
    if kind != "masks":
        raise ValueError(f"{reader.path} is a {kind} store; overlays need a masks store")
    arrays = ["forward", *(["backward"] if "backward" in reader.settings.arrays else []), "valid"]
    stems = FileStems(reader.keys)
    with progress.task("draw", len(keys), unit="clips") as task:
        for entry in map(reader.record, keys):
            masks = reader.read(entry.key, arrays)
            _check_size(reader, masks["forward"].shape, clips)
            clip = load_source_clip(
                dataset,
                clips,
                shard=entry.shard,
                key=entry.key,
                video=video_hash_in(entry.fingerprint),
            )
            view = _view(entry, masks, None if isinstance(clip, str) else clip, clips, reader.name)
            stem = stems.of(entry.key)
            drawing = Drawing(
                key=entry.key,
                picture=out_dir / f"{stem}.overlay.png",
                video=out_dir / f"{stem}.overlay.mp4",
                notes=(f"no frames: {clip}",) if isinstance(clip, str) else (),
            )
            long_side = max(clips.width, clips.height)
            shown = long_side * max(1, _VIDEO_LONG_SIDE // long_side) / DPI
            write_drawing(
                drawing,
                overlay_figure(view, _moments(view), _SHEET_PANEL),
                (overlay_figure(view, [t], shown) for t in range(clips.num_frames)),
                clips.fps or DEFAULT_FPS,
            )
            task.advance()
            yield drawing


def _check_size(reader: StoreReader, shape: tuple[int, ...], clips: ClipsConfig) -> None:
    num_frames, height, width = shape
    if num_frames != clips.num_frames or height * clips.width != width * clips.height:
        raise ValueError(
            f"{reader.path} holds {num_frames} masks of {height}x{width} per clip, but the "
            f"configuration sets {clips.num_frames} frames of {clips.height}x{clips.width}; use "
            "the configuration that the store was made with"
        )


def _view(
    entry: ClipEntry,
    arrays: Mapping[str, np.ndarray],
    clip: Clip | None,
    clips: ClipsConfig,
    store: str,
) -> OverlayView:
    shape = (clips.num_frames, clips.height, clips.width, 3)
    return OverlayView(
        title=f"{entry.key} in {store}",
        facts=describe_track(entry.attributes, clips.num_frames),
        frames_THW3=np.full(shape, _GREY, np.uint8) if clip is None else clip.frames_THWC,
        forward_Thw=arrays["forward"],
        backward_Thw=arrays.get("backward"),
        valid_T=arrays["valid"] != 0,
        prompts=prompts_of(entry.attributes, clip),
    )


def _moments(view: OverlayView) -> list[int]:
    """Frames of the contact sheet, including prompted ones and the first that is not valid."""
    invalid = np.flatnonzero(~view.valid_T)[:1].tolist()
    return spread_moments(len(view.valid_T), _SHEET_FRAMES, [*sorted(view.prompts), *invalid])


def prompts_of(
    attributes: Mapping[str, Any], clip: Clip | None
) -> dict[int, Sequence[SubjectPrompt]]:
    """Prompts by frame: boxes found at extraction, or the dataset's prompts, read from the clip."""
    prompt = attributes["prompt"]
    found: dict[int, Sequence[SubjectPrompt]] = {}
    if boxes := prompt.get("boxes"):
        found[prompt["frame"]] = [SubjectPrompt(box_xyxy=tuple(box["box_xyxy"])) for box in boxes]
    if clip is None:
        return found
    if prompt["source"] == "dataset" and clip.prompts:
        found[prompt["frame"]] = clip.prompts
    if prompt["backward"] == "dataset" and clip.last_frame_prompts:
        last = len(clip.frames_THWC) - 1
        found[last] = [*found.get(last, ()), *clip.last_frame_prompts]
    return found


def overlay_figure(view: OverlayView, moments: Sequence[int], long_side: float) -> Figure:
    """Draw frames with their masks in rows of four, under the title and over a legend.

    Args:
        view: The clip.
        moments: The frames.
        long_side: Of a frame in the figure, in inches.
    """
    columns = min(_SHEET_COLUMNS, len(moments))
    height, width = view.frames_THW3.shape[1:3]
    size = panel_size(width, height, long_side)
    handles = _legend(view)
    legend_columns = max(1, int(columns * size[0] / _LEGEND_COLUMN))
    figure, axes = panel_figure(
        view.title,
        ", ".join(view.facts),
        (-(-len(moments) // columns), columns),
        size,
        gap=0.24,
        below=0.1 + 0.16 * -(-len(handles) // legend_columns),
    )
    panels = [panel for row in axes for panel in row]
    for panel in panels[len(moments) :]:
        panel.set_visible(False)
    for panel, moment in zip(panels, moments, strict=False):
        _draw_frame(panel, view, moment)
    figure.legend(
        handles=handles,
        loc="lower left",
        ncols=legend_columns,
        frameon=False,
        fontsize=TEXT_SIZE,
        labelcolor=FAINT,
        borderpad=0.2,
        labelspacing=0.4,
    )
    return figure


def _legend(view: OverlayView) -> list[Line2D | Patch]:
    lines: list[tuple[str, str, Any]] = [("forward track", FORWARD, "-")]
    if view.backward_Thw is not None:
        lines.append(("backward track (dashed)", BACKWARD, _DASHED))
    if view.prompts:
        lines.append(("prompt", PROMPT, "-"))
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colour, linestyle=style, linewidth=2, label=label, path_effects=_RIM)
        for label, colour, style in lines
    ]
    if not view.valid_T.all():
        label = "not valid: masked out in training"
        handles.append(Patch(facecolor="none", edgecolor=WARNING, linewidth=2, label=label))
    return handles


def _draw_frame(panel: Axes, view: OverlayView, moment: int) -> None:
    """Draw one frame with its masks and prompts; dimmed and framed if it is not valid."""
    valid = bool(view.valid_T[moment])
    panel.set_facecolor("black")
    panel.imshow(view.frames_THW3[moment], aspect="auto", alpha=1.0 if valid else 0.45)
    panel.autoscale(False)
    draw_mask(panel, view.forward_Thw[moment], FORWARD)
    if view.backward_Thw is not None:
        draw_mask(panel, view.backward_Thw[moment], BACKWARD, linestyle=_DASHED)
    prompts = view.prompts.get(moment, ())
    for prompt in prompts:
        draw_prompt(panel, prompt)
    if not valid:
        mark_invalid(panel)
    panel.set_title(
        f"frame {moment}" + (", prompt" if prompts else "") + ("" if valid else ", not valid"),
        loc="left",
        fontsize=TEXT_SIZE,
        color=FAINT if valid else WARNING,
        pad=3,
    )


def draw_mask(
    panel: Axes, mask_hw: np.ndarray, colour: str, *, tint: float = 0.35, linestyle: Any = "-"
) -> None:
    """Outline and tint where a mask is at least one half.

    Args:
        panel: Axes that show a frame; the mask covers all of it, whatever its own size.
        mask_hw: uint8, 255 times a probability.
        colour: Of the outline and the tint.
        tint: Opacity of the tint.
        linestyle: Of the outline; the frame's edge adds none.
    """
    left, right, bottom, top = panel.axis()
    padded_hw = np.pad(mask_hw.astype(np.float32), 1, mode="edge")
    height, width = mask_hw.shape
    x = left + (right - left) * (np.arange(-1, width + 1) + 0.5) / width
    y = top + (bottom - top) * (np.arange(-1, height + 1) + 0.5) / height
    if tint:
        panel.contourf(x, y, padded_hw, levels=[_HALF, 256], colors=[colour], alpha=tint)
    if padded_hw.min() < _HALF < padded_hw.max():
        panel.contour(
            x, y, padded_hw, levels=[_HALF], colors=[colour], linewidths=1.4, linestyles=[linestyle]
        ).set_path_effects(_RIM if linestyle == "-" else [])


def draw_prompt(panel: Axes, prompt: SubjectPrompt) -> None:
    """Draw a box, points (crosses off the subject), or a mask's outline, in frame pixels."""
    if prompt.mask_HW is not None:
        draw_mask(panel, prompt.mask_HW.astype(np.uint8) * 255, PROMPT, tint=0.0)
    elif prompt.box_xyxy is not None:
        right, bottom = (np.array(panel.axis())[[1, 2]]).tolist()
        x0, y0, x1, y1 = prompt.box_xyxy
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, right - 0.5), min(y1, bottom - 0.5)
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=PROMPT, linewidth=1.6)
        box.set_path_effects(_RIM)
        panel.add_patch(box)
    else:
        assert prompt.points_xy is not None and prompt.point_labels is not None
        for marker, face, label in (("o", PROMPT, 1), ("X", "black", 0)):
            x_N, y_N = prompt.points_xy[prompt.point_labels == label].T
            panel.scatter(x_N, y_N, s=36, marker=marker, c=face, edgecolors=_EDGES[label])
