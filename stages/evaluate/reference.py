"""Real clips that generated videos are measured against."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cache_schema import JSON
from stages.clips import (
    BadRecord,
    ClipDataset,
    ClipsConfig,
    open_dataset,
    select_clips,
    videos_below,
)
from stages.clips.dataset.layouts import find_layout
from stages.evaluate.motion import motion_features
from stages.evaluate.tracked_videos import TrackedVideos, track_videos
from stages.evaluate.videos import VBENCH_NAME, Video
from stages.extract_features.config import ExtractConfig
from stages.progress import Progress
from stages.sample_videos.requests import PromptRow
from stages.video_scores.structure import SubjectTracks


class NoSceneError(ValueError):
    """The reference has no clip of a video's scene, or several that cannot be told apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Real clips and their captions."""

    name: str
    path: Path
    dataset: ClipDataset
    """The clips; bad records among them are skipped when they are tracked."""
    captions: Mapping[str, str | None]
    """Caption of each clip, by key; None if it has none."""
    keys: Mapping[tuple[str, int | None], str] = field(default_factory=dict)
    """Key of the clip with a prompt and number, for clips that have one."""

    def clip_of(self, video: Video) -> str:
        """The key of the clip with the scene of a video: of its prompt, otherwise of its key.

        Several clips of one prompt are told apart by the number, as videos are.

        Raises:
            NoSceneError: There is no such clip, or more than one.
        """
        if video.prompt is None:
            if video.key not in self.captions:
                raise NoSceneError(f"{self.name} has no clip of its name")
            return video.key
        if video.pair in self.keys:
            return self.keys[video.pair]
        found = [key for key, caption in self.captions.items() if caption == video.prompt]
        if not found:
            raise NoSceneError(f"{self.name} has no clip of its prompt")
        if len(found) > 1:
            raise NoSceneError(
                f"{self.name} has {len(found)} clips of its prompt, such as {found[0]} and "
                f"{found[1]}, and none or several of number {video.number}"
            )
        return found[0]


def open_reference(path: Path, clips: ClipsConfig) -> Reference:
    """List real clips: a dataset of any layout, or a folder of videos with or without captions.

    A clip without a caption may have its prompt and number in its name, `{prompt}-{n}`.

    Args:
        path: The folder, or what `data.path` may be otherwise.
        clips: Settings of clips; the path is not used.

    Raises:
        ValueError: There are no clips.
    """
    clips = clips.model_copy(update={"path": path})
    try:
        dataset = videos_below(clips) if _holds_plain_videos(path) else open_dataset(clips)
    except ValueError as error:
        raise ValueError(f"no reference clips at {path}: {error}") from error
    captions: dict[str, str | None] = {}
    named: defaultdict[tuple[str, int | None], list[str]] = defaultdict(list)
    for shard in dataset.shards:
        for record in shard.records():
            caption = None if isinstance(record, BadRecord) else record.caption
            match = VBENCH_NAME.fullmatch(record.key.rpartition("/")[2])
            if match is not None and caption in (None, match["prompt"]):
                caption = match["prompt"]
                named[caption, int(match["number"])].append(record.key)
            captions[record.key] = caption
    name = path.resolve().name
    keys = {pair: found[0] for pair, found in named.items() if len(found) == 1}
    return Reference(name=name, path=path, dataset=dataset, captions=captions, keys=keys)


def held_out_reference(rows: Mapping[str, PromptRow], clips: ClipsConfig, *, num: int) -> Reference:
    """The clips whose prompts and first frames are sampled.

    Args:
        rows: Prompt and first seed of the videos sampled of each clip, by key.
        clips: The dataset with the clips.
        num: Videos of each clip, with consecutive seeds.

    Raises:
        ValueError: There is no dataset.
    """
    return Reference(
        name="held-out-clips",
        path=clips.path,
        dataset=select_clips(open_dataset(clips), rows.keys()),
        captions={key: row.prompt for key, row in rows.items()},
        keys={
            (row.prompt, row.seed + further): key
            for key, row in rows.items()
            if row.seed is not None
            for further in range(num)
        },
    )


def _holds_plain_videos(path: Path) -> bool:
    return path.is_dir() and find_layout(path).kind == "videos"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedReference:
    """The tracks of reference clips."""

    reference: Reference
    tracked: TrackedVideos
    motion: Mapping[str, np.ndarray]
    """`motion_features` of the clips with a track, by key."""

    @property
    def problems(self) -> dict[str, str]:
        """Why clips have no track, by key."""
        known = self.reference.captions
        return {key: why for key, why in self.tracked.skipped.items() if key in known}

    def tracks_of(self, video: Video) -> SubjectTracks:
        """The tracks of the clip with the scene of a video.

        Raises:
            NoSceneError: There is no such clip, or it has no track.
        """
        key = self.reference.clip_of(video)
        tracks = self.tracked.read(key)
        if tracks is None:
            why = self.problems.get(key, "its shard is not finished")
            raise NoSceneError(f"clip {key} of {self.reference.name} has no track: {why}")
        return tracks


def track_reference(
    reference: Reference,
    extract: ExtractConfig,
    clips: ClipsConfig,
    *,
    cache: Path,
    temperature: float,
    provenance: dict[str, JSON],
    progress: Progress,
) -> TrackedReference:
    """Track the subjects of reference clips as those of videos; see `score_side`."""
    tracked = track_videos(
        reference.dataset, cache, extract, clips, provenance=provenance, progress=progress
    )
    motion: dict[str, np.ndarray] = {}
    with progress.task(f"{reference.name}: motion", len(tracked), unit="clips") as task:
        for key, tracks in tracked.tracks():
            if key in reference.captions:
                motion[key] = motion_features(tracks, temperature=temperature)
            task.advance()
    return TrackedReference(reference=reference, tracked=tracked, motion=motion)
