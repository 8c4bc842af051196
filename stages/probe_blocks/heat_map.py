"""Heat map of agreement by block and timestep, with the mean over timesteps and its intervals."""

import io
import math

import numpy as np
from matplotlib.figure import Figure

from stages.evaluate.compare import Mean
from stages.probe_blocks.results import ProbeResults

_INK, _FAINT, _MISSING, _BEST = "#1e1e1e", "#6e6e6e", "#d8d8d4", "#c81e1e"
_MAX_NUMBERED = 16
"""Blocks up to which every cell holds its number."""
_DPI = 128


def draw_heat_map(results: ProbeResults) -> bytes:
    """Draw a PNG; blocks from left to right, timesteps from little noise to much.

    A cell is grey if the loss of a held-out clip is missing. The dots below are means over the
    timesteps, with 95% intervals over the held-out clips if there are enough of them.
    """
    blocks, timesteps = results.blocks, sorted(results.timesteps)
    agreement_SB = np.array(
        [
            [_complete(results.agreement(block, timestep)) for block in blocks]
            for timestep in timesteps
        ]
    )
    numbered = len(blocks) <= _MAX_NUMBERED
    width = max(6.0, 1.6 + (0.5 if numbered else 0.28) * len(blocks))
    figure = Figure(
        figsize=(width, 3.1 + 0.36 * len(timesteps)),
        dpi=_DPI,
        facecolor="#fafaf8",
        layout="constrained",
    )
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=[0.36 * len(timesteps) + 0.2, 1.7]
    )
    above.set_facecolor(_MISSING)
    picture = above.imshow(agreement_SB, aspect="auto", cmap="viridis")
    colours = picture.norm
    if numbered:
        for (row, column), value in np.ndenumerate(agreement_SB):
            dark = not np.isnan(value) and colours(value) < 0.6
            above.text(
                column,
                row,
                "none" if np.isnan(value) else f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else _INK,
            )
    above.set_yticks(range(len(timesteps)), [str(timestep) for timestep in timesteps])
    above.set_ylabel("timestep")
    figure.colorbar(picture, ax=above, label="agreement")

    for column, block in enumerate(blocks):
        mean = results.agreement(block)
        colour = _BEST if block is results.best else _INK
        below.plot(column, _complete(mean), "o", color=colour, markersize=4)
        if mean.low is not None and mean.high is not None and not mean.missing:
            below.vlines(column, mean.low, mean.high, color=colour, linewidth=1.2)
    step = -(-len(blocks) // (2 * _MAX_NUMBERED))
    below.set_xticks(range(0, len(blocks), step), [str(block.block) for block in blocks[::step]])
    below.set_xlabel("block, counted from 0 (red: the lowest loss)")
    below.set_ylabel("mean over timesteps")
    below.grid(axis="y", color="#e3e6ea")
    below.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Agreement with the teacher's Gram flow on {len(results.uniform)} held-out clips\n"
        "0: a uniform flow, 1: the teacher's own",
        fontsize=9,
        color=_FAINT,
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _complete(mean: Mean) -> float:
    """NaN if the mean lacks a clip, since it cannot be compared with the others."""
    return math.nan if mean.missing else mean.mean
