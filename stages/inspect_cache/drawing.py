"""The files that a drawing becomes, and their names; used by `draw_store` and `overlay`."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stages.clips import write_video

# Legend: T frame of the video, H W its pixels.

USUAL_FPS = 8.0
"""CogVideoX 1.0's rate, for clips whose own rate is kept."""

_LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Where a clip's picture and video lie, and what they had to leave out."""

    key: str
    picture: Path
    video: Path
    notes: tuple[str, ...]


def file_stem(key: str, keys: Iterable[str]) -> str:
    """A file name for `key` that leads out of no folder and that no other of `keys` gets."""
    readable = _readable(key)
    if any(other != key and _readable(other) == readable for other in keys):
        return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return readable


def _readable(key: str) -> str:
    return re.sub(r"[^\w.-]+", "-", key).strip("-.")[:_LONGEST_NAME] or "clip"


def write_drawing(
    drawing: Drawing, picture: Image.Image, video_THW3: np.ndarray, fps: float
) -> None:
    """Write both files; each appears whole or not at all.

    Args:
        drawing: where they go; the folder is made when missing.
        picture: written as PNG.
        video_THW3: uint8, sides even.
        fps: frames per second of the video.
    """
    drawing.picture.parent.mkdir(parents=True, exist_ok=True)
    half_written = drawing.picture.with_suffix(".png.part")
    picture.save(half_written, format="PNG")
    half_written.replace(drawing.picture)
    write_video(drawing.video, video_THW3, fps)
