"""Draws one clip of a store as a picture and a video; used by `inspect` and `demo`.

Teacher stores show feature colours and the implied flow, latents stores the posterior's mean;
text has no picture.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_schema import ClipEntry, StoreReader
from stages.clips import ClipDataset, ClipsConfig, write_video
from stages.inspect_cache.picture import chosen_moments, compose, compose_video
from stages.inspect_cache.view import ClipView, find_frames, view_features
from stages.progress import Progress

_ARRAYS = {"teacher": "features", "latents": "mean"}
DRAWN_KINDS = tuple(_ARRAYS)
"""Kinds of stores that have a picture."""

_ROWS = 6
_USUAL_FPS = 8.0
"""CogVideoX 1.0's rate, for clips whose own rate is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Where a clip's picture and video lie, and what they had to leave out."""

    key: str
    picture: Path
    video: Path
    notes: tuple[str, ...]


def draw_store(
    store: Path,
    key: str | None,
    *,
    out_dir: Path,
    clips: ClipsConfig,
    dataset: ClipDataset | None,
    radius: int,
    temperature: float,
    progress: Progress,
) -> Drawing:
    """Draw a clip of a store: rows of frames, colours of the features, implied flow.

    Args:
        store: Folder of a store.
        key: Which clip; None takes the store's first.
        out_dir: Where `<clip>.png` and `<clip>.mp4` are written; made when missing.
        clips: The clips' length, size and rate, as at extraction.
        dataset: Where the frames come from; None leaves their column out.
        radius: Half the window of the flow, in tokens.
        temperature: Of the flow's softmax.
        progress: Told of the steps.

    Raises:
        CacheError: No such clip, or one that does not pass its checks.
        ValueError: A store without picture or clips, or of other clips than `clips` says.
    """
    reader = StoreReader(store)
    kind = reader.settings.kind
    if kind not in _ARRAYS:
        raise ValueError(f"{store} is a {kind} store, which has no picture; draw {DRAWN_KINDS}")
    if not len(reader):
        raise ValueError(f"{store} holds no clip; its skipped clips say why")
    entry = reader.record(reader.keys[0] if key is None else key)
    with progress.task("draw", 3, unit="steps") as task:
        features_THWC = _features(reader, entry.key, kind)
        task.advance()
        notes, frames_THWC = _frames(dataset, clips, entry, features_THWC.shape[1:3])
        view = view_features(
            features_THWC,
            title=f"{entry.key} in {store.name}",
            num_frames=clips.num_frames,
            frames_THWC=frames_THWC,
            flow=(radius, temperature) if kind == "teacher" else None,
        )
        task.advance()
        name = re.sub(r"[^\w.-]+", "-", entry.key).strip("-.")[:80] or "clip"
        drawing = Drawing(
            key=entry.key,
            picture=out_dir / f"{name}.png",
            video=out_dir / f"{name}.mp4",
            notes=notes,
        )
        _write(view, drawing, _rate(clips, len(features_THWC)))
        task.advance()
    return drawing


def _features(reader: StoreReader, key: str, kind: str) -> np.ndarray:
    array = reader.read(key, [_ARRAYS[kind]])[_ARRAYS[kind]]
    return array.transpose(0, 2, 3, 1) if kind == "latents" else array


def _frames(
    dataset: ClipDataset | None, clips: ClipsConfig, entry: ClipEntry, grid: tuple[int, ...]
) -> tuple[tuple[str, ...], np.ndarray | None]:
    if dataset is None:
        return (f"no frames: no dataset at {clips.path}",), None
    found = find_frames(dataset, clips, shard=entry.shard, key=entry.key)
    if isinstance(found, str):
        return (f"no frames: {found}",), None
    height, width = found.shape[1:3]
    if height * grid[1] != width * grid[0]:
        return (f"no frames: {width}x{height} is not the shape of the store's grid",), None
    return (), found


def _rate(clips: ClipsConfig, num_moments: int) -> float:
    return (clips.fps or _USUAL_FPS) * num_moments / clips.num_frames


def _write(view: ClipView, drawing: Drawing, fps: float) -> None:
    drawing.picture.parent.mkdir(parents=True, exist_ok=True)
    half_written = drawing.picture.with_suffix(".png.part")
    compose(view, chosen_moments(view, _ROWS)).save(half_written, format="PNG")
    half_written.replace(drawing.picture)
    write_video(drawing.video, compose_video(view), fps)
