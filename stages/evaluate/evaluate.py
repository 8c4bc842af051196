"""Scores the videos of one or two sides, and compares the sides."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cache_schema import JSON
from stages.clips import ClipsConfig, VideoError, videos_below
from stages.evaluate.compare import Comparison, Mean, compare_pairs, mean_of
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.distances import Distance
from stages.evaluate.feature_distances import FeatureEvaluation
from stages.evaluate.frame_scorer import FrameScorer
from stages.evaluate.motion import motion_distance, motion_features, motion_to_reference
from stages.evaluate.reference import NoSceneError, TrackedReference
from stages.evaluate.tracked_videos import track_videos
from stages.evaluate.vbench_summary import VBenchMeasured, VBenchSummary, vbench_summary
from stages.evaluate.videos import Side, Video, pair_videos
from stages.extract_features.config import ExtractConfig
from stages.progress import Progress
from stages.video_scores.divergence import DIVERGENCE, NotComparableError, divergence_scores
from stages.video_scores.groups import FRAME_SCORES, SCORES
from stages.video_scores.score import Score
from stages.video_scores.structure import SubjectTracks, structure_scores
from stages.video_scores.vbench.long import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class SideScores:
    """The scores of one side's videos."""

    side: Side
    values: Mapping[str, Mapping[str, float]]
    """Value of each score, by the video's key and the score's name; NaN where the video does not
    allow one."""
    problems: Mapping[str, str]
    """Why a video lacks scores, by key."""
    unmatched: Mapping[str, str]
    """Why a video with a track has no score of `DIVERGENCE`, by key; empty without a reference."""
    motion: Mapping[str, np.ndarray]
    """`motion_features` of the videos with a track, by key."""
    protocols: Mapping[str, Protocol] = field(default_factory=dict)
    """VBench's protocol for the decoded videos, by key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores of one or two sides."""

    scores: tuple[Score, ...]
    sides: tuple[SideScores, ...]
    pairs: tuple[tuple[Video, Video], ...]
    """Videos of the same prompt and seed; empty with one side."""
    unpaired: tuple[str, ...]
    """Keys of videos without a partner."""
    means: Mapping[str, tuple[Mean, ...]]
    """Mean of each score per side."""
    differences: Mapping[str, Comparison]
    """First side minus second side over the pairs, by score; empty with one side."""
    motion: Distance | None
    """Distance between the motion of both sides; None with one side, or without tracks."""
    reference: TrackedReference | None
    """The real clips that the videos were measured against; None if none were given."""
    to_reference: Mapping[str, tuple[Distance, ...]]
    """Distances between each side and the reference, by name; empty without a reference."""
    features: FeatureEvaluation | None
    """Distances over the features of a network; None without a network or a second set."""
    vbench: VBenchSummary | None
    """None unless VBench's dimensions are among the scores."""

    @property
    def skipped_share(self) -> float:
        """Fraction of videos that lack some of their scores, features, or a partner."""
        without = 0
        for number, one in enumerate(self.sides):
            alone = {video.key for video in one.side.videos}
            alone -= {pair[number].key for pair in self.pairs}
            lacking = one.problems.keys() | (alone if len(self.sides) == 2 else set())
            if self.features is not None:
                lacking |= self.features.problems[number].keys()
            without += len(lacking)
        return without / sum(len(one.side.videos) for one in self.sides)


def score_side(
    side: Side,
    config: EvaluateConfig,
    extract: ExtractConfig,
    clips: ClipsConfig,
    *,
    cache: Path,
    frames: FrameScorer,
    temperature: float,
    provenance: dict[str, JSON],
    progress: Progress,
    reference: TrackedReference | None = None,
) -> SideScores:
    """Compute the scores of a side's videos.

    Args:
        side: The videos.
        config: Which scores.
        extract: Settings of SAM2 and of the prompts.
        clips: Size, length and rate at which subjects are tracked.
        cache: Folder of the tracks; tracks that are there are kept.
        frames: Computes the scores of frames.
        temperature: Temperature of the Gram flow.
        provenance: Information on the run, recorded in the stores.
        progress: Shows bars.
        reference: Real clips, among which each video is compared with that of its scene.
    """
    videos = {video.key: video for video in side.videos}
    values: dict[str, dict[str, float]] = {key: {} for key in videos}
    problems: dict[str, str] = {}
    unmatched: dict[str, str] = {}
    motion: dict[str, np.ndarray] = {}
    protocols: dict[str, Protocol] = {}
    if "structure" in config.scores:
        tracked = track_videos(
            videos_below(clips.model_copy(update={"path": side.folder})),
            cache,
            extract,
            clips,
            provenance=provenance,
            progress=progress,
        )
        problems |= {key: why for key, why in tracked.skipped.items() if key in values}
        with progress.task(f"{side.name}: structure", len(tracked), unit="videos") as task:
            for key, tracks in tracked.tracks():
                if key in values:
                    values[key] |= structure_scores(tracks, temperature=temperature)
                    motion[key] = motion_features(tracks, temperature=temperature)
                    if reference is not None:
                        found, problem = _divergence(videos[key], tracks, reference, temperature)
                        values[key] |= found
                        if problem is not None:
                            unmatched[key] = problem
                task.advance()
    if any(group in config.scores for group in FRAME_SCORES):
        with progress.task(f"{side.name}: frames", len(values), unit="videos") as task:
            for video in side.videos:
                try:
                    scores = frames.score(video)
                except VideoError as error:
                    problems.setdefault(video.key, f"undecodable: {error}")
                else:
                    values[video.key] |= scores.values
                    protocols[video.key] = scores.protocol
                    if scores.problem is not None:
                        problems.setdefault(video.key, scores.problem)
                task.advance()
    return SideScores(
        side=side,
        values=values,
        problems=problems,
        unmatched=unmatched,
        motion=motion,
        protocols=protocols,
    )


def _divergence(
    video: Video, tracks: SubjectTracks, reference: TrackedReference, temperature: float
) -> tuple[dict[str, float], str | None]:
    """The scores of `DIVERGENCE`, or why there are none."""
    try:
        clip = reference.tracks_of(video)
        return divergence_scores(tracks, clip, temperature=temperature), None
    except (NoSceneError, NotComparableError) as error:
        return {}, str(error)


def compare_sides(
    sides: Sequence[SideScores],
    config: EvaluateConfig,
    reference: TrackedReference | None = None,
    features: FeatureEvaluation | None = None,
) -> Evaluation:
    """Average the scores of each side, and compare the pairs of two sides.

    Args:
        sides: Scores of one or two sides.
        config: Which scores.
        reference: Real clips whose distance to each side is computed.
        features: Distances over the features of a network.
    """
    scores = tuple(
        score
        for group in config.scores
        for score in SCORES[group]
        if reference is not None or score not in DIVERGENCE
    )
    pairs: list[tuple[Video, Video]] = []
    unpaired: list[str] = []
    if len(sides) == 2:
        pairs, unpaired = pair_videos(sides[0].side, sides[1].side)
    motion = None
    if len(sides) == 2 and "structure" in config.scores:
        first, second = (one.motion.values() for one in sides)
        motion = motion_distance(first, second, seed=config.seed)
    vbench = None
    if "vbench" in config.scores:
        vbench = vbench_summary(
            [
                VBenchMeasured(
                    name=one.side.name,
                    values=list(one.values.values()),
                    protocols=list(one.protocols.values()),
                )
                for one in sides
            ],
            config.vbench,
            has_subject_motion="structure" in config.scores,
        )
    return Evaluation(
        motion=motion,
        reference=reference,
        to_reference={} if reference is None else _distances(sides, reference, config.seed),
        features=features,
        vbench=vbench,
        scores=scores,
        sides=tuple(sides),
        pairs=tuple(pairs),
        unpaired=tuple(unpaired),
        means={
            score.name: tuple(
                mean_of(
                    _column(one, score, one.side.videos),
                    seed=config.seed,
                    prompts=_prompts(one.side.videos),
                )
                for one in sides
            )
            for score in scores
        },
        differences={
            score.name: compare_pairs(
                _column(sides[0], score, [first for first, _ in pairs]),
                _column(sides[1], score, [second for _, second in pairs]),
                better=score.better,
                seed=config.seed,
                prompts=_prompts([first for first, _ in pairs]),
            )
            for score in scores
            if pairs
        },
    )


def _distances(
    sides: Sequence[SideScores], reference: TrackedReference, seed: int
) -> dict[str, tuple[Distance, ...]]:
    """The distance of each side to the reference, by name."""
    return {
        "motion (MMD^2)": tuple(
            motion_to_reference(one.motion.values(), reference.motion.values(), seed=seed)
            for one in sides
        )
    }


def _column(scores: SideScores, score: Score, videos: Sequence[Video]) -> np.ndarray:
    """float64 [videos]: the values of a score; NaN for videos without it."""
    values = (scores.values[video.key].get(score.name, math.nan) for video in videos)
    return np.array([score.check(value) for value in values])


def _prompts(videos: Sequence[Video]) -> list[tuple[str, str]]:
    """What the videos of one prompt share; a video without a prompt stands alone."""
    return [
        ("key", video.key) if video.prompt is None else ("prompt", video.prompt) for video in videos
    ]
