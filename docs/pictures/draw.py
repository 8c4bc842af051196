"""Draws the pictures of docs/concepts.md from a clip of the demo and the demo's tracker.

python docs/pictures/draw.py     # rewrites the PNG files beside this script, in seconds
"""

# Legend: T frame, H W pixels or token grid, P pair, K neighbour, G fused channel.

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from stages.clips import SubjectPrompt
from stages.demo.build import PRETRAINED
from stages.demo.scenes import FigureClip, draw_clip
from stages.extract_features.teacher.clip_features import ClipFeatures, fused_features
from stages.local_gram_flow import (
    implied_motion,
    latent_frame_of_frame,
    local_gram_flow,
    neighbour_mask,
    time_weights,
)
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.tracker import Tracker

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import ConnectionPatch, Rectangle

HERE = Path(__file__).parent
SEED, FRAMES, HEIGHT, WIDTH, FPS = 1, 17, 128, 192, 8.0
GRID, RADIUS, TEMPERATURE = (16, 24), 3, 0.1
FRAME = 6
MARK = "#ff2d95"


def main() -> None:
    """Track the clip and draw every picture."""
    clip = draw_clip(
        SEED, num_frames=FRAMES, height=HEIGHT, width=WIDTH, fps=FPS, post_probability=0.0
    )
    found = track(clip)
    flow_PHWK = local_gram_flow(found.features_THWG[None], RADIUS)[0]
    plt.rcParams.update({"font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9})
    save(draw_window(clip, flow_PHWK), "window")
    save(draw_tracks(clip, found), "tracks")
    save(draw_temperature(clip, flow_PHWK), "temperature")
    save(draw_time(), "time")


def track(clip: FigureClip) -> ClipFeatures:
    """Features of the clip's figure, on a grid finer than the demo's own to be seen better."""
    folder = PRETRAINED / "sam2"
    sam2 = build_sam2(folder / "tiny.yaml", folder / "tiny.safetensors", image_size=256)
    return fused_features(
        Tracker(sam2, precision="fp32"),
        clip.frames_THWC,
        SubjectPrompt(mask_HW=clip.masks_THW[0]),
        token_grid=GRID,
        features="memory_encoder",
    )


def save(figure: Any, name: str) -> None:
    """Write a figure as a small PNG."""
    from PIL import Image

    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    picture = Image.fromarray(pixels).quantize(128, dither=Image.Dither.NONE)
    picture.save(HERE / f"{name}.png", optimize=True)
    plt.close(figure)


def figure_of(columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """A row of axes without ticks."""
    figure, axes = plt.subplots(1, columns, figsize=(8, height), dpi=110, **options)
    for one in np.ravel(axes):
        one.set_xticks([])
        one.set_yticks([])
    return figure, axes


def token_of_subject(clip: FigureClip) -> tuple[int, int]:
    """Row and column of a token at the end of a limb: the figure's lowest visible pixel."""
    rows, columns = clip.masks_THW[FRAME].nonzero()
    lowest = rows.argmax()
    size = HEIGHT // GRID[0]
    return int(rows[lowest]) // size, int(columns[lowest]) // size


def draw_window(clip: FigureClip, flow_PHWK: Tensor) -> Any:
    """A token of one frame, its window in the next, and its similarities to that window."""
    row, column = token_of_subject(clip)
    size, side = HEIGHT // GRID[0], 2 * RADIUS + 1
    figure, axes = figure_of(4, 2.1, width_ratios=(1.5, 1.5, 1, 1), layout="constrained")
    titles = (f"frame {FRAME}", f"frame {FRAME + 1}", "cosine", f"softmax at {TEMPERATURE}")
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title)
    for place in (0, 1):
        axes[place].imshow(clip.frames_THWC[FRAME + place])
    box = {"fill": False, "edgecolor": MARK, "linewidth": 1.6}
    axes[0].add_patch(Rectangle((column * size, row * size), size, size, **box))
    corner = ((column - RADIUS) * size, (row - RADIUS) * size)
    axes[1].add_patch(Rectangle(corner, side * size, side * size, **box))
    axes[1].set_xlim(0, WIDTH)
    axes[1].set_ylim(HEIGHT, 0)
    similarity_K = flow_PHWK[FRAME, row, column]
    probability_K = probabilities(flow_PHWK[FRAME], TEMPERATURE)[row, column]
    for one, values_K in zip(axes[2:], (similarity_K, probability_K), strict=True):
        one.imshow(window_image(values_K, row, column), cmap="magma")
    line = ConnectionPatch(
        (column * size + size, row * size),
        corner,
        "data",
        "data",
        axesA=axes[0],
        axesB=axes[1],
        color=MARK,
    )
    figure.add_artist(line)
    return figure


def window_image(values_K: Tensor, row: int, column: int) -> np.ndarray:
    """[side, side], NaN outside the grid."""
    inside_K = neighbour_mask(*GRID, RADIUS)[row, column]
    side = 2 * RADIUS + 1
    return np.asarray(values_K.masked_fill(~inside_K, torch.nan).reshape(side, side))


def probabilities(flow_HWK: Tensor, temperature: float) -> Tensor:
    """Softmax over the neighbours inside the grid."""
    inside_HWK = neighbour_mask(*GRID, RADIUS)
    return (flow_HWK / temperature).masked_fill(~inside_HWK, -torch.inf).softmax(-1)


def draw_tracks(clip: FigureClip, found: ClipFeatures) -> Any:
    """A frame, the features of each track and their fusion as colours, and the implied motion.

    Motion is drawn on the figure's tokens, at four times its length.
    """
    forward, backward = found.track.forward, found.track.backward
    assert backward is not None
    figure, axes = figure_of(5, 1.35, layout="constrained")
    titles = ("frame", "forward track", "backward track", "fused", "implied motion")
    maps = (forward.features_THWC, backward.features_THWC, found.features_THWG)
    axes[0].imshow(clip.frames_THWC[FRAME])
    for one, features in zip(axes[1:4], maps, strict=True):
        one.imshow(as_colours(features[FRAME]), aspect="equal")
    motion_HW2 = implied_motion(local_gram_flow(found.features_THWG[None], RADIUS), TEMPERATURE)[
        0, FRAME
    ]
    size = HEIGHT // GRID[0]
    y, x = (np.mgrid[0 : GRID[0], 0 : GRID[1]] + 0.5) * size
    axes[4].imshow(clip.frames_THWC[FRAME], alpha=0.45)
    shown_HW = clip.masks_THW[FRAME][y.astype(int), x.astype(int)]
    dx, dy = 4 * size * motion_HW2.numpy()[shown_HW].T
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.01, "color": MARK}
    axes[4].quiver(x[shown_HW], y[shown_HW], dx, dy, **arrows)
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title)
    return figure


def as_colours(features_HWC: Tensor) -> np.ndarray:
    """First three principal components of unit tokens, scaled to 0..1."""
    tokens_NC = torch.nn.functional.normalize(features_HWC, dim=-1).flatten(0, 1)
    tokens_NC = tokens_NC - tokens_NC.mean(0)
    components_NC = tokens_NC @ torch.linalg.svd(tokens_NC, full_matrices=False).Vh[:3].T
    low, high = torch.quantile(components_NC, torch.tensor([0.01, 0.99]), dim=0)
    scaled = ((components_NC - low) / (high - low)).clamp(0, 1)
    return np.asarray(scaled.reshape(*features_HWC.shape[:2], 3))


def draw_temperature(clip: FigureClip, flow_PHWK: Tensor) -> Any:
    """The same window as a distribution at four temperatures."""
    row, column = token_of_subject(clip)
    temperatures = (1.0, 0.3, 0.1, 0.03)
    figure, axes = figure_of(len(temperatures), 2.0, layout="constrained")
    for one, temperature in zip(axes, temperatures, strict=True):
        probability_K = probabilities(flow_PHWK[FRAME], temperature)[row, column]
        one.imshow(window_image(probability_K, row, column), cmap="magma", vmin=0)
        one.set_title(f"temperature {temperature:g}")
    return figure


def draw_time() -> Any:
    """Which frames each latent frame of the causal VAE covers, and where its token is placed."""
    latent_T = latent_frame_of_frame(FRAMES).numpy()
    weights_TJ = time_weights(FRAMES, FRAMES)
    assert weights_TJ is not None
    figure, axis = plt.subplots(figsize=(8, 1.5), dpi=110, layout="constrained")
    colours = plt.get_cmap("tab10")(np.arange(latent_T.max() + 1))
    for frame, latent in enumerate(latent_T):
        axis.add_patch(Rectangle((frame - 0.45, 0), 0.9, 0.6, color=colours[latent], alpha=0.8))
        axis.text(frame, 0.3, frame, ha="center", va="center", color="white")
    for latent, colour in enumerate(colours):
        frames = np.flatnonzero(latent_T == latent)
        axis.plot(frames.mean(), 0.9, "v", color=colour, markersize=8)
        axis.text(frames.mean(), 1.1, f"latent {latent}", ha="center", color=colour)
    axis.set_xlim(-0.6, FRAMES - 0.4)
    axis.set_ylim(-0.05, 1.4)
    axis.set_axis_off()
    return figure


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
