"""Scores of a video's frames, kept on disk so that a stopped evaluation resumes.

    {folder}/{settings}/{video}.json    scores of one video; both names are hashes

The hash of the settings covers what changes a score besides the video: the groups, the networks'
files, the kind of device, and the source code.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import stages
from cache_schema.atomic_io import make_directories, write_atomic
from stages.clips import read_video
from stages.clips.fingerprints import hash_parts
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.videos import Video
from stages.files.hashes import sha256_of_file, sha256_of_files
from stages.files.text import read_object
from stages.video_scores.groups import FRAME_SCORES, frame_scores
from stages.video_scores.vbench.long import Protocol, protocol_of
from stages.video_scores.vbench.networks import NO_NETWORKS, VBenchNetworks


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameScores:
    """What was computed from a video's frames."""

    values: Mapping[str, float]
    """By score; NaN where the video does not allow one."""
    problem: str | None
    """Why it lacks some."""
    protocol: Protocol
    """VBench's protocol for its length."""


class FrameScorer:
    """Computes the scores of `FRAME_SCORES`, or reads those that were computed before.

    Args:
        folder: Folder of the computed scores; created when it is needed.
        config: Which scores.
        networks: Networks of VBench's dimensions.
    """

    def __init__(
        self, folder: Path, config: EvaluateConfig, networks: VBenchNetworks = NO_NETWORKS
    ) -> None:
        self._groups = tuple(group for group in FRAME_SCORES if group in config.scores)
        self._networks = networks
        self._folder = folder / hash_parts(
            [*self._groups, None, networks.sha256, networks.device.type, _source_code()]
        )

    def score(self, video: Video) -> FrameScores:
        """Compute or read the scores of a video.

        Raises:
            VideoError: It cannot be decoded.
            ValueError: The file with its scores is damaged.
        """
        file = self._folder / f"{hash_parts([sha256_of_file(video.path), video.prompt])}.json"
        if file.is_file():
            return _read(file)
        frames_THWC, fps = read_video(video.path)
        values, problem = frame_scores(
            frames_THWC, self._groups, prompt=video.prompt, fps=fps, networks=self._networks
        )
        protocol = protocol_of(len(frames_THWC), fps)
        make_directories(self._folder)
        content = {
            "values": {
                score: None if math.isnan(value) else value for score, value in values.items()
            },
            "problem": problem,
            "protocol": protocol,
        }
        write_atomic(file, (json.dumps(content) + "\n").encode())
        return FrameScores(values=values, problem=problem, protocol=protocol)


def _read(file: Path) -> FrameScores:
    content = read_object(file, values=dict, protocol=str)
    values: dict[str, Any] = content["values"]
    if not all(value is None or isinstance(value, int | float) for value in values.values()):
        raise ValueError(f"{file} is damaged; remove it, and the scores are computed again")
    return FrameScores(
        values={score: math.nan if value is None else value for score, value in values.items()},
        problem=content.get("problem"),
        protocol=cast(Protocol, content["protocol"]),
    )


def _source_code() -> str:
    """Hash of the code of `stages`, whose changes may change scores."""
    (root,) = map(Path, stages.__path__)
    return sha256_of_files(root, (file.relative_to(root).as_posix() for file in root.rglob("*.py")))
