"""VBench's dimensions that need no network, and its result file.

Written from Vchitect/VBench at 45e79ec: `vbench/temporal_flickering.py`, `vbench/__init__.py`.
"""

import json
import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from stages.video_scores.score import Score

# Legend: T frame, H W pixels, C colour (RGB).

RESULTS_SUFFIX = "_eval_results.json"

VBENCH = (
    Score(
        name="temporal_flickering",
        unit="1",
        lowest=0.0,
        highest=1.0,
        better="higher",
        description="1 - mean absolute difference of consecutive frames; 1 for a still video",
        source="VBench, on videos without motion only: on others it measures how much moves",
    ),
)


def vbench_scores(frames_THWC: np.ndarray) -> dict[str, float]:
    """Compute the scores of `VBENCH` for one video.

    VBench takes temporal flickering on videos of prompts without motion, and of these only on those
    that its RAFT filter (`static_filter.py`) finds static. It decodes with OpenCV, whose colour
    conversion may differ by rounding.

    Args:
        frames_THWC: uint8 RGB.

    Returns:
        Values by name; NaN for a single frame.
    """
    if len(frames_THWC) < 2:
        return {"temporal_flickering": math.nan}
    total = sum(
        int((np.maximum(before, after) - np.minimum(before, after)).sum(dtype=np.int64))
        for before, after in pairwise(frames_THWC)
    )
    return {"temporal_flickering": 1.0 - total / frames_THWC[1:].size / 255.0}


def results_json(dimensions: Mapping[str, Mapping[str, float]]) -> str:
    """The content of VBench's `{name}_eval_results.json`.

    That is {dimension: [mean, [{video_path, video_results}, ...]]}. VBench has no form for a
    missing value: videos without one are left out, and dimensions without videos too.

    Args:
        dimensions: value by dimension and path of the video.
    """
    content = {}
    for dimension, videos in dimensions.items():
        known = {path: value for path, value in videos.items() if not math.isnan(value)}
        if known:
            rows = [{"video_path": path, "video_results": v} for path, v in known.items()]
            content[dimension] = [math.fsum(known.values()) / len(known), rows]
    return json.dumps(content, ensure_ascii=False, indent=4, allow_nan=False) + "\n"
