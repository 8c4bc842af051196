"""Draws clips of a store as a picture and a video each; used by `inspect` and `demo`.

Teacher stores show feature colours and the implied flow, gram_flow stores the flow, latents stores
the posterior's mean; masks are drawn over their frames by `overlay`, and text has no picture.
"""

# Legend: T moment in the store (frame or latent frame), H W grid, C channel.

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cache_schema import ClipEntry, StoreReader
from stages.clips import ClipDataset, ClipsConfig
from stages.inspect_cache.drawing import USUAL_FPS, Drawing, FileStems, write_drawing
from stages.inspect_cache.picture import chosen_moments, compose, compose_video
from stages.inspect_cache.source_clips import find_clip
from stages.inspect_cache.stored_clip import read_clip
from stages.inspect_cache.view import view_clip
from stages.progress import Progress

DRAWN_KINDS = ("teacher", "gram_flow", "latents")
"""Kinds of stores that have a picture."""

_ROWS = 6


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
    """Draw clips of a store: rows of frames, colours of the features, implied flow.

    Args:
        reader: The store.
        keys: Which clips.
        out_dir: Where `<clip>.png` and `<clip>.mp4` are written; made when missing.
        clips: The clips' length, size and rate, as at extraction.
        dataset: Where the frames come from; None leaves their column out.
        radius: Half the window of the flow, in tokens; a smaller one where no more is stored.
        temperature: Of the flow's softmax.
        progress: Told of the clips.

    Raises:
        CacheError: No such clip, or one that does not pass its checks.
        ValueError: A store without picture, or of other clips than `clips` says.
    """
    kind = reader.settings.kind
    if kind not in DRAWN_KINDS:
        drawn = ", ".join(DRAWN_KINDS)
        raise ValueError(
            f"{reader.path} is a {kind} store, which has no picture of its own; {drawn} stores "
            "have one, and a masks store is drawn over its frames with inspect --overlay"
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
            picture = compose(view, chosen_moments(view, _ROWS))
            write_drawing(drawing, picture, compose_video(view), _rate(clips, len(view.labels)))
            task.advance()
            yield drawing


def _frames(
    dataset: ClipDataset | None, clips: ClipsConfig, entry: ClipEntry, grid: tuple[int, int]
) -> tuple[tuple[str, ...], np.ndarray | None]:
    found = find_clip(dataset, clips, shard=entry.shard, key=entry.key)
    if isinstance(found, str):
        return (f"no frames: {found}",), None
    height, width = found.frames_THWC.shape[1:3]
    if height * grid[1] != width * grid[0]:
        return (f"no frames: {width}x{height} is not the shape of the store's grid",), None
    return (), found.frames_THWC


def _rate(clips: ClipsConfig, num_moments: int) -> float:
    return (clips.fps or USUAL_FPS) * num_moments / clips.num_frames
