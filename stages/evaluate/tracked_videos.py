"""Tracks of videos and clips: stage one's masks and Gram flow of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache_schema import JSON, StoreReader
from stages.clips import ClipDataset, ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.run import extract_features
from stages.progress import Progress
from stages.teacher_store.gram_flow import decode_gram_flow
from stages.video_scores.structure import SubjectTracks

_KINDS: tuple[Kind, ...] = ("gram_flow", "masks")
_MASK_THRESHOLD = 128
"""Masks are stored as 255 * probability."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedVideos:
    """The stores with the tracks of videos."""

    readers: tuple[Mapping[Kind, StoreReader], ...]
    """One entry per size of clip."""
    skipped: Mapping[str, str]
    """Why videos were skipped, by key."""
    fps: float | None
    """Frames per second of the tracks; None if each video has its own rate."""

    def __len__(self) -> int:
        return sum(len(of_size["masks"]) for of_size in self.readers)

    def tracks(self) -> Iterator[tuple[str, SubjectTracks]]:
        """Read the tracks of all videos, by key."""
        for of_size in self.readers:
            for key in of_size["masks"].keys:
                yield key, _read_tracks(of_size, key, self.fps)

    def read(self, key: str) -> SubjectTracks | None:
        """Read the tracks of one video; None if it has none."""
        for of_size in self.readers:
            if key in of_size["masks"]:
                return _read_tracks(of_size, key, self.fps)
        return None


def track_videos(
    dataset: ClipDataset,
    cache: Path,
    extract: ExtractConfig,
    clips: ClipsConfig,
    *,
    provenance: dict[str, JSON],
    progress: Progress,
) -> TrackedVideos:
    """Track the subject of every video both ways; finished videos are kept.

    Args:
        dataset: The videos.
        cache: Folder of the stores, used for these videos only.
        extract: Settings of SAM2, of the prompts and of the Gram flow. The prompt source `dataset`
            reads masks beside the videos, `{name}.mask.png` (see `first_frame_masks`).
        clips: Size, length and rate that videos are read at; the path is not used.
        provenance: Information on the run, recorded in the stores.
        progress: Shows a bar.

    Raises:
        ValueError: SAM2's checkpoint is missing or wrong.
        CacheError: A store is damaged.
    """
    # Poor tracks are what is measured: none is skipped for being inconsistent.
    # Scores are of frames, at whatever rate the model is trained.
    teacher = extract.teacher.model_copy(
        update={"min_cycle_consistency": 0.0, "time_rate": "frame"}
    )
    config = extract.model_copy(update={"kinds": _KINDS, "engine": "local", "teacher": teacher})
    summary = extract_features(
        config,
        clips,
        BaseModelConfig(path="(not read)"),
        cache,
        provenance=provenance,
        progress=progress,
        refresh_changed=True,
        dataset=dataset,
    )
    stores: dict[str | None, dict[Kind, StoreReader]] = {}
    for one in summary.kinds:
        stores.setdefault(one.bucket, {})[one.kind] = StoreReader(one.store)
    skipped = {
        clip.key: f"{clip.reason}: {clip.detail}" for one in summary.kinds for clip in one.skipped
    }
    return TrackedVideos(readers=tuple(stores.values()), skipped=skipped, fps=clips.fps)


def _read_tracks(readers: Mapping[Kind, StoreReader], key: str, fps: float | None) -> SubjectTracks:
    if fps is None:
        geometry: Any = readers["masks"].record(key).attributes["geometry"]
        fps = float(geometry["source_fps"])
    masks = readers["masks"].read(key)
    flow = readers["gram_flow"].read(key)
    backward = masks.get("backward")
    return SubjectTracks(
        forward_TMN=masks["forward"] >= _MASK_THRESHOLD,
        backward_TMN=None if backward is None else backward >= _MASK_THRESHOLD,
        valid_T=masks["valid"] != 0,
        fps=fps,
        similarities_PHWK=decode_gram_flow(
            {name: torch.from_numpy(array) for name, array in flow.items() if name != "valid"}
        ),
    )
