"""VBench-Long: videos of 5 s and more are measured in pieces of 2 s, and from piece to piece.

Written from Vchitect/VBench at 45e79ec: `README-FAQ.md` (which protocol), `vbench2_beta_long/
utils.py` (`split_video_into_clips`, `fuse_inclip_clip2clip`), `configs/slow_fast_params.yaml`, and
`evaluate_long.sh`, whose `--dev_flag` turns on the part from piece to piece.

VBench-Long encodes the pieces again before it measures them, which is not done here.
"""

import json
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

Protocol = Literal["VBench", "VBench-Long"]

_LONG_S = 5.0
_PIECE_S = 2
_WITHIN, _BETWEEN = 0.5, 0.5
"""Weights of the consistency within the pieces and of that from piece to piece."""

_MAPPING_FILE = Path(__file__).parent / "slow_fast.json"


def protocol_of(num_frames: int, fps: float) -> Protocol:
    """The protocol for a video of this length: VBench-Long from 5 s on."""
    return "VBench-Long" if num_frames / fps >= _LONG_S else "VBench"


def piece_fps(fps: float) -> int:
    """The rate of the pieces, whole frames per second; VBench-Long needs at least 1."""
    return max(1, int(fps))


def pieces_of(num_frames: int, fps: float) -> list[range]:
    """The frames of each piece of 2 s; the last one begins earlier if frames are left over.

    49 frames at 8 per second are 0 to 15, 16 to 31, 32 to 47 and 33 to 48.
    """
    length = piece_fps(fps) * _PIECE_S
    pieces = [range(first, first + length) for first in range(0, num_frames - length + 1, length)]
    if num_frames % length or not pieces:
        pieces.append(range(max(0, num_frames - length), num_frames))
    return pieces


def slow_fast(
    within: float,
    between: float,
    dimension: Literal["subject_consistency", "background_consistency"],
) -> float:
    """Weigh the consistency within pieces and that from piece to piece.

    Args:
        within: Mean over the pieces, with DINO or CLIP.
        between: Consistency of the first frames of the pieces, with DINOv2 or DreamSim; VBench-Long
            maps it to the quantile of `within` in its own videos.
        dimension: Whose mapping is used.

    Returns:
        The weighted mean; `within` alone if `between` is 0.
    """
    values = mapping_of(dimension)
    mapped = float(np.interp(between, np.arange(len(values)) / (len(values) - 1), values))
    return within if mapped == 0 else _WITHIN * within + _BETWEEN * mapped


@cache
def mapping_of(dimension: str) -> tuple[float, ...]:
    """VBench-Long's consistency within pieces at 0, 0.01, .. 1 from piece to piece."""
    return tuple(json.loads(_MAPPING_FILE.read_text(encoding="utf-8"))[dimension])
