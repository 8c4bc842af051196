"""Draws one clip of a store as a picture and a video; used by `inspect` and `demo`.

Teacher stores show feature colours and the implied flow, latents stores the posterior's mean;
masks are drawn over their frames by `overlay`, and text has no picture.
"""

# Legend: T moment in the store (frame or latent frame), H W grid, C channel.

from pathlib import Path

import numpy as np
import torch

from cache_schema import ClipEntry, StoreReader
from stages.clips import ClipDataset, ClipsConfig
from stages.inspect_cache.drawing import USUAL_FPS, Drawing, file_stem, write_drawing
from stages.inspect_cache.picture import chosen_moments, compose, compose_video
from stages.inspect_cache.source_clips import find_clip
from stages.inspect_cache.view import view_features
from stages.local_gram_flow import regrid_fused
from stages.progress import Progress

DRAWN_KINDS = ("teacher", "latents")
"""Kinds of stores that have a picture."""

_ROWS = 6


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
    if kind not in DRAWN_KINDS:
        drawn = ", ".join(DRAWN_KINDS)
        raise ValueError(
            f"{store} is a {kind} store, which has no picture of its own; {drawn} stores have one, "
            "and a masks store is drawn over its frames with inspect --overlay"
        )
    if not len(reader):
        raise ValueError(f"{store} holds no clip; its skipped clips say why")
    entry = reader.record(reader.keys[0] if key is None else key)
    with progress.task("draw", 3, unit="steps") as task:
        features_THWC, valid_T, regridded = _features(reader, entry.key, clips)
        task.advance()
        notes, frames_THWC = _frames(dataset, clips, entry, features_THWC.shape[1:3])
        view = view_features(
            features_THWC,
            title=f"{entry.key} in {store.name}",
            num_frames=clips.num_frames,
            frames_THWC=frames_THWC,
            valid_T=valid_T,
            flow=(radius, temperature) if kind == "teacher" else None,
        )
        task.advance()
        stem = file_stem(entry.key, reader.keys)
        drawing = Drawing(
            key=entry.key,
            picture=out_dir / f"{stem}.png",
            video=out_dir / f"{stem}.mp4",
            notes=(*notes, *regridded),
        )
        picture = compose(view, chosen_moments(view, _ROWS))
        write_drawing(drawing, picture, compose_video(view), _rate(clips, len(features_THWC)))
        task.advance()
    return drawing


def _features(
    reader: StoreReader, key: str, clips: ClipsConfig
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """What is drawn, which moments are valid (None: all), and what was done to it."""
    if reader.settings.kind == "latents":
        return reader.read(key, ["mean"])["mean"].transpose(0, 2, 3, 1), None, ()
    arrays, values = reader.read(key, ["features", "valid"]), reader.settings.values
    features_THWC, valid_T = arrays["features"], arrays["valid"] != 0
    grid, parts = features_THWC.shape[1:3], values.get("parts")
    if values.get("grid_source") != "native" or not isinstance(parts, int):
        return features_THWC, valid_T, ()
    fused_THWG = torch.from_numpy(features_THWC)
    regridded_THWG = regrid_fused(fused_THWG, *clips.token_grid, parts).numpy()
    (height, width), (to_height, to_width) = grid, clips.token_grid
    note = f"{height}x{width} tokens are shown as training reads them, at {to_height}x{to_width}"
    return regridded_THWG, valid_T, (note,)


def _frames(
    dataset: ClipDataset | None, clips: ClipsConfig, entry: ClipEntry, grid: tuple[int, ...]
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
