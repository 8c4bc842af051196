"""Draw clips of a store, each as an image and a video.

Teacher stores show features as colours and the implied flow, gram_flow stores the flow, latents
stores the posterior mean. Masks are drawn over their frames by `overlay`; text is not drawn.
"""

# Legend: T moment in the store (frame or latent frame), H W grid, C channel.

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cache_schema import ClipEntry, StoreReader
from stages.clips import ClipDataset, ClipsConfig
from stages.inspect_cache.drawing import DEFAULT_FPS, Drawing, FileStems, write_drawing
from stages.inspect_cache.picture import chosen_moments, compose, compose_video
from stages.inspect_cache.source_clips import load_source_clip
from stages.inspect_cache.stored_clip import read_clip
from stages.inspect_cache.view import view_clip
from stages.progress import Progress

DRAWN_KINDS = ("teacher", "gram_flow", "latents")
"""Kinds of stores that can be drawn."""

_MAX_ROWS = 6


def draw_store(
    reader: StoreReader,
    keys: Sequence[str],
    *,
    out_dir: Path,
    clips: ClipsConfig,
    dataset: ClipDataset | None,
    radius: int,
    temperature: float,
    progress: Progress,
) -> Iterator[Drawing]:
    """Draw clips of a store: rows of frames, features as colours, implied flow.

    Args:
        reader: The store.
        keys: Keys of the clips.
        out_dir: Folder for `<clip>.png` and `<clip>.mp4`; created if missing.
        clips: Length, size and frame rate of the clips, as at extraction.
        dataset: Source of the frames; None omits their column.
        radius: Half the window of the flow, in tokens; limited to the stored window.
        temperature: Softmax temperature of the flow.
        progress: Advanced once per clip.

    Raises:
        CacheError: No such clip, or one that fails its checks.
        ValueError: A store that cannot be drawn, or whose clips do not match `clips`.
    """
    kind = reader.settings.kind
    if kind not in DRAWN_KINDS:
        drawn = " or ".join(DRAWN_KINDS)
        raise ValueError(
            f"{reader.path} is a {kind} store, which cannot be drawn by itself; draw a {drawn} "
            "store, or a masks store over its frames with inspect --overlay"
        )
    stems = FileStems(reader.keys)
    with progress.task("draw", len(keys), unit="clips") as task:
        for entry in map(reader.record, keys):
            stored = read_clip(reader, entry.key, clips, radius=radius, temperature=temperature)
            notes, frames_THWC = _frames(dataset, clips, entry, stored.grid)
            view = view_clip(
                stored.features_THWC,
                stored.flow_PHW2,
                title=f"{entry.key} in {reader.name}",
                num_frames=clips.num_frames,
                frames_THWC=frames_THWC,
                valid_T=stored.valid_T,
            )
            stem = stems.of(entry.key)
            drawing = Drawing(
                key=entry.key,
                picture=out_dir / f"{stem}.png",
                video=out_dir / f"{stem}.mp4",
                notes=(*notes, *stored.notes),
            )
            picture = compose(view, chosen_moments(view, _MAX_ROWS))
            write_drawing(
                drawing, picture, compose_video(view), _video_fps(clips, len(view.labels))
            )
            task.advance()
            yield drawing


def _frames(
    dataset: ClipDataset | None, clips: ClipsConfig, entry: ClipEntry, grid: tuple[int, int]
) -> tuple[tuple[str, ...], np.ndarray | None]:
    found = load_source_clip(dataset, clips, shard=entry.shard, key=entry.key)
    if isinstance(found, str):
        return (f"no frames: {found}",), None
    height, width = found.frames_THWC.shape[1:3]
    if height * grid[1] != width * grid[0]:
        return (
            f"no frames: {width}x{height} does not have the aspect ratio of the store's grid",
        ), None
    return (), found.frames_THWC


def _video_fps(clips: ClipsConfig, num_moments: int) -> float:
    return (clips.fps or DEFAULT_FPS) * num_moments / clips.num_frames
