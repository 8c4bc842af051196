"""VBench's result files, and its weighted mean over dimensions.

Written from Vchitect/VBench at 45e79ec: `vbench/__init__.py`, `scripts/constant.py`,
`scripts/cal_final_score.py`.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stages.video_scores.vbench.long import Protocol

RESULTS_SUFFIX = "_eval_results.json"
INFO_SUFFIX = "_full_info.json"

NORMALISATION: Mapping[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0),
}
"""What VBench maps to 0 and to 1 before it averages dimensions; values outside are not clipped."""

WEIGHTS: Mapping[str, float] = dict.fromkeys(NORMALISATION, 1.0) | {"dynamic_degree": 0.5}


def five_dimension_mean(means: Mapping[str, float]) -> float:
    """VBench's weighted mean of its five dimensions of motion and consistency, normalised.

    It is not the quality score of VBench's board, which has aesthetic and imaging quality besides.

    Args:
        means: Mean over the videos of each of the five.

    Returns:
        NaN unless all five are there; above 1 where motion smoothness is above 0.9975.
    """
    total = math.fsum(
        WEIGHTS[name] * (means.get(name, math.nan) - low) / (high - low)
        for name, (low, high) in NORMALISATION.items()
    )
    return total / math.fsum(WEIGHTS.values())


def results_json(dimensions: Mapping[str, Mapping[str, float]], protocol: Protocol) -> str:
    """The content of VBench's `{name}_eval_results.json`.

    That is {dimension: [mean, [{video_path, video_results}, ...]]}. VBench has no form for a
    missing value: videos without one are left out, and dimensions without videos too. Its own mean
    of the consistencies is over frames; they agree where all videos have the same length.

    Args:
        dimensions: value by dimension and path of the video.
        protocol: VBench writes dynamic degree as true or false, VBench-Long as a fraction.
    """
    content: dict[str, list[Any]] = {}
    for dimension, videos in dimensions.items():
        known = {path: value for path, value in videos.items() if not math.isnan(value)}
        if known:
            is_bool = dimension == "dynamic_degree" and protocol == "VBench"
            rows = [
                {"video_path": path, "video_results": bool(value) if is_bool else value}
                for path, value in known.items()
            ]
            content[dimension] = [math.fsum(known.values()) / len(known), rows]
    return json.dumps(content, ensure_ascii=False, indent=4, allow_nan=False) + "\n"


def full_info_json(
    videos: Sequence[tuple[str, str | None]], dimensions: Collection[str]
) -> str | None:
    """The content of VBench's `{name}_full_info.json`: which videos were measured for a prompt.

    Args:
        videos: Path and prompt of each video.
        dimensions: What was measured.

    Returns:
        None if a prompt is not known: VBench would take the file's name for one.
    """
    paths: dict[str, list[str]] = {}
    for path, prompt in videos:
        if prompt is None:
            return None
        paths.setdefault(prompt, []).append(path)
    content = [
        {"prompt_en": prompt, "dimension": list(dimensions), "video_list": of_prompt}
        for prompt, of_prompt in paths.items()
    ]
    return json.dumps(content, ensure_ascii=False, indent=4) + "\n"
