"""VBench's dimensions of one video, by the protocol for its length.

Frames and pairs of frames that several pieces or dimensions share are computed once, in batches
whose memory does not grow with the video.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.video_scores.vbench.dimensions import (
    FASTEST_OF_DYNAMIC,
    FASTEST_OF_STATIC,
    consistency,
    dynamic_degree,
    dynamic_frames,
    fastest_mean,
    frame_difference,
    is_static,
    smoothness,
)
from stages.video_scores.vbench.long import piece_fps, pieces_of, protocol_of, slow_fast
from stages.video_scores.vbench.networks import (
    FLOW_MULTIPLE,
    INTERPOLATION_MULTIPLE,
    MIN_SIDE,
    Encoder,
    PairNetwork,
    VBenchNetworks,
)
from stages.video_scores.vbench.preprocess import pad_to_multiple, remove_padding

# Legend: B batch, T frame, P pair of frames, H W pixels, C colour (RGB), D feature.

_FRAMES_AT_ONCE = 16
_FLOWS_AT_ONCE = 2
"""The correlations of a pair of 480x720 frames take 120 MB in RAFT."""

Pair = tuple[int, int]


@torch.inference_mode()
def vbench_scores(
    frames_THWC: np.ndarray, *, fps: float, networks: VBenchNetworks
) -> tuple[dict[str, float], str | None]:
    """Compute the dimensions of `VBENCH` for one video.

    VBench decodes with decord and OpenCV, whose colour conversion may differ by rounding.

    Args:
        frames_THWC: uint8 RGB.
        fps: Frames per second.
        networks: Those that are there.

    Returns:
        Values by name, without those whose network is not there, and why the video does not allow
        some. NaN for a single frame, and for temporal flickering where RAFT finds motion.
    """
    count, height, width, _ = frames_THWC.shape
    parts, dinov2, dreamsim = [range(count)], None, None
    if protocol_of(count, fps) == "VBench-Long":
        parts, fps = pieces_of(count, fps), piece_fps(fps)
        dinov2, dreamsim = networks.dinov2, networks.dreamsim
    video = _Video(frames_THWC, networks.device)
    found: dict[str, float] = {}
    if networks.dino is not None:
        found["subject_consistency"] = video.consistency(
            "subject_consistency", parts, networks.dino, dinov2
        )
    if networks.clip is not None:
        found["background_consistency"] = video.consistency(
            "background_consistency", parts, networks.clip, dreamsim
        )
    if networks.flow is None:
        found["temporal_flickering"] = video.flickering(parts)
    problem, flow, interpolate = None, networks.flow, networks.interpolate
    if min(height, width) < MIN_SIDE and (flow is not None or interpolate is not None):
        problem = f"{height}x{width} frames: RAFT and AMT need {MIN_SIDE} pixels"
    elif flow is not None:
        found |= _flow_scores(video, flow, parts, fps=fps, height=height, width=width)
    if problem is None and interpolate is not None:
        found["motion_smoothness"] = video.motion_smoothness(parts, interpolate)
    return found, problem


def _flow_scores(
    video: "_Video",
    flow: PairNetwork,
    parts: Sequence[range],
    *,
    fps: float,
    height: int,
    width: int,
) -> dict[str, float]:
    """Temporal flickering of the parts without motion, and dynamic degree."""
    looked_at = [list(pairwise(dynamic_frames(part, fps))) for part in parts]
    ends = [((part[0], part[-1]), (part[-1], part[0])) for part in parts]
    speeds = video.speeds(
        flow, {*chain(*looked_at), *chain(*ends), *chain(*(pairwise(part) for part in parts))}
    )
    still = [
        part
        for part, (outward, back) in zip(parts, ends, strict=True)
        if is_static(
            np.array([speeds[pair].static for pair in pairwise(part)]),
            speeds[outward].static,
            speeds[back].static,
            height=height,
            width=width,
        )
    ]
    dynamic = (
        dynamic_degree(
            np.array([speeds[pair].dynamic for pair in pairs]), height=height, width=width
        )
        for pairs in looked_at
    )
    return {"temporal_flickering": video.flickering(still), "dynamic_degree": _mean(dynamic)}


class _Speeds(NamedTuple):
    """Mean speed of the fastest pixels of a pair, by what it is for."""

    dynamic: float
    static: float


class _Video:
    """A video's frames, and what is computed from them."""

    def __init__(self, frames_THWC: np.ndarray, device: torch.device) -> None:
        self._frames_THWC = frames_THWC
        self._device = device

    def consistency(
        self,
        dimension: Literal["subject_consistency", "background_consistency"],
        parts: Sequence[range],
        encode: Encoder,
        encode_firsts: Encoder | None,
    ) -> float:
        """Consistency within the parts, with that of their first frames if it has a network."""
        indices = range(len(self._frames_THWC))
        features_TD = self._features(encode, indices, at_once=_FRAMES_AT_ONCE)
        within = _mean(consistency(features_TD[part]) for part in parts)
        if encode_firsts is None:
            return within
        firsts_BD = self._features(encode_firsts, [part[0] for part in parts], at_once=1)
        return slow_fast(within, consistency(firsts_BD), dimension)

    def flickering(self, parts: Iterable[range]) -> float:
        """Temporal flickering of the parts, mean; NaN without any."""
        return _mean(
            smoothness(
                np.array([frame_difference(*self._frames_THWC[[i, j]]) for i, j in pairwise(part)])
            )
            for part in parts
        )

    def motion_smoothness(self, parts: Iterable[range], interpolate: PairNetwork) -> float:
        """Motion smoothness of the parts, mean; every second frame of each is interpolated."""
        kept = [list(pairwise(part[::2])) for part in parts]
        errors: dict[Pair, float] = {}
        for before, after in sorted({pair for pairs in kept for pair in pairs}):
            padded = [
                pad_to_multiple(self._tensor([index]), INTERPOLATION_MULTIPLE)
                for index in (before, after)
            ]
            between_HWC = self._frames_THWC[before + 1]
            image_BCHW = remove_padding(interpolate(*padded), *between_HWC.shape[:2])
            errors[before, after] = _difference_from(image_BCHW[0], between_HWC)
        return _mean(smoothness(np.array([errors[pair] for pair in pairs])) for pairs in kept)

    def speeds(self, flow: PairNetwork, pairs: Collection[Pair]) -> dict[Pair, _Speeds]:
        """Mean speed of the fastest pixels of each pair."""
        found: dict[Pair, _Speeds] = {}
        for batch in _batches(sorted(pairs), _FLOWS_AT_ONCE):
            flow_B2HW = flow(
                *(
                    pad_to_multiple(self._tensor([pair[end] for pair in batch]), FLOW_MULTIPLE)
                    for end in (0, 1)
                )
            )
            dynamic_B = fastest_mean(flow_B2HW, FASTEST_OF_DYNAMIC).tolist()
            static_B = fastest_mean(flow_B2HW, FASTEST_OF_STATIC).tolist()
            found |= zip(batch, map(_Speeds, dynamic_B, static_B), strict=True)
        return found

    def _features(self, encode: Encoder, indices: Sequence[int], *, at_once: int) -> np.ndarray:
        features = [encode(self._tensor(batch)) for batch in _batches(indices, at_once)]
        return torch.cat(features).double().cpu().numpy()

    def _tensor(self, indices: Sequence[int]) -> Tensor:
        """float32 [B, C, H, W] frames, 0 to 255, on the device."""
        frames_BHWC = torch.from_numpy(self._frames_THWC[list(indices)]).to(self._device)
        return frames_BHWC.permute(0, 3, 1, 2).float()


def _difference_from(image_CHW: Tensor, frame_HWC: np.ndarray) -> float:
    """`frame_difference` of a frame and an image from 0 to 1, NaN where that is NaN or infinite.

    As in VBench, the image is cut off to 8 bits, not rounded.
    """
    if not torch.isfinite(image_CHW).all():
        return math.nan
    levels_HWC = (image_CHW * 255).clamp(0, 255).permute(1, 2, 0).to(torch.uint8)
    return frame_difference(levels_HWC.cpu().numpy(), frame_HWC)


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _mean(values: Iterable[float]) -> float:
    """NaN if there are none, or one is NaN."""
    known = list(values)
    return float(np.mean(known)) if known else math.nan
