"""Draw the masks of a store over the clips' frames, as a contact sheet and a video."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import ClipEntry, StoreReader
from stages.clips import Clip, ClipDataset, ClipsConfig, SubjectPrompt
from stages.inspect_cache.clip_facts import describe_track
from stages.inspect_cache.drawing import DEFAULT_FPS, Drawing, FileStems, write_drawing
from stages.inspect_cache.overlay_picture import (
    OverlayView,
    compose_overlay_video,
    compose_sheet,
    sheet_moments,
)
from stages.inspect_cache.source_clips import load_source_clip
from stages.progress import Progress

_SHEET_FRAMES = 8
_GREY = 128


def draw_overlay(
    reader: StoreReader,
    keys: Sequence[str],
    *,
    out_dir: Path,
    clips: ClipsConfig,
    dataset: ClipDataset | None,
    progress: Progress,
) -> Iterator[Drawing]:
    """Draw tracked masks over the frames of their clips.

    Each direction's mask is tinted and outlined in its colour; where the outlines coincide, the
    colours alternate. Frames that are not valid are dimmed and framed; prompts are drawn on their
    frame.

    Args:
        reader: A masks store.
        keys: Keys of the clips.
        out_dir: Folder for `<clip>.overlay.png` and `<clip>.overlay.mp4`; created if missing.
        clips: Length, size and frame rate of the clips, as at extraction.
        dataset: Source of the frames; None draws the masks on grey.
        progress: Advanced once per clip.

    Raises:
        CacheError: No such clip, or one that fails its checks.
        ValueError: A store of another kind, or whose clips do not match `clips`.
    """
    kind = reader.settings.kind
    if kind != "masks":
        raise ValueError(f"{reader.path} is a {kind} store; overlays need a masks store")
    arrays = ["forward", *(["backward"] if "backward" in reader.settings.arrays else []), "valid"]
    stems = FileStems(reader.keys)
    with progress.task("draw", len(keys), unit="clips") as task:
        for entry in map(reader.record, keys):
            masks = reader.read(entry.key, arrays)
            _check_size(reader, masks["forward"].shape, clips)
            clip = load_source_clip(dataset, clips, shard=entry.shard, key=entry.key)
            view = _view(entry, masks, None if isinstance(clip, str) else clip, clips, reader.name)
            stem = stems.of(entry.key)
            drawing = Drawing(
                key=entry.key,
                picture=out_dir / f"{stem}.overlay.png",
                video=out_dir / f"{stem}.overlay.mp4",
                notes=(f"no frames: {clip}",) if isinstance(clip, str) else (),
            )
            sheet = compose_sheet(view, _moments(view))
            write_drawing(drawing, sheet, compose_overlay_video(view), clips.fps or DEFAULT_FPS)
            task.advance()
            yield drawing


def _check_size(reader: StoreReader, shape: tuple[int, ...], clips: ClipsConfig) -> None:
    num_frames, height, width = shape
    if num_frames != clips.num_frames or height * clips.width != width * clips.height:
        raise ValueError(
            f"{reader.path} holds {num_frames} masks of {height}x{width} per clip, but the "
            f"configuration sets {clips.num_frames} frames of {clips.height}x{clips.width}; use "
            "the configuration that the store was made with"
        )


def _view(
    entry: ClipEntry,
    arrays: Mapping[str, np.ndarray],
    clip: Clip | None,
    clips: ClipsConfig,
    store: str,
) -> OverlayView:
    shape = (clips.num_frames, clips.height, clips.width, 3)
    return OverlayView(
        title=f"{entry.key} in {store}",
        facts=describe_track(entry.attributes, clips.num_frames),
        frames_THW3=np.full(shape, _GREY, np.uint8) if clip is None else clip.frames_THWC,
        forward_Thw=arrays["forward"],
        backward_Thw=arrays.get("backward"),
        valid_T=arrays["valid"] != 0,
        prompts=prompts_of(entry.attributes, clip),
    )


def _moments(view: OverlayView) -> list[int]:
    """Frames of the contact sheet, including prompted ones and the first that is not valid."""
    invalid = np.flatnonzero(~view.valid_T)[:1].tolist()
    return sheet_moments(len(view.valid_T), _SHEET_FRAMES, [*sorted(view.prompts), *invalid])


def prompts_of(
    attributes: Mapping[str, Any], clip: Clip | None
) -> dict[int, Sequence[SubjectPrompt]]:
    """Prompts by frame: boxes found at extraction, or the dataset's prompts, read from the clip."""
    prompt = attributes["prompt"]
    found: dict[int, Sequence[SubjectPrompt]] = {}
    if boxes := prompt.get("boxes"):
        found[prompt["frame"]] = [SubjectPrompt(box_xyxy=tuple(box["box_xyxy"])) for box in boxes]
    if clip is None:
        return found
    if prompt["source"] == "dataset" and clip.prompts:
        found[prompt["frame"]] = clip.prompts
    if prompt["backward"] == "dataset" and clip.last_frame_prompts:
        last = len(clip.frames_THWC) - 1
        found[last] = [*found.get(last, ()), *clip.last_frame_prompts]
    return found
