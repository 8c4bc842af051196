"""Output files of a drawn clip, and their names."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stages.clips import write_video

# Legend: T frame of the video, H W pixels of the video.

DEFAULT_FPS = 8.0
"""CogVideoX 1.0's frame rate, used if the clips keep their own rate."""

_MAX_STEM_CHARS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Paths of a clip's image and video, and notes on what they lack."""

    key: str
    picture: Path
    video: Path
    notes: tuple[str, ...]


class FileStems:
    """Unique file names for clips, without path separators."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Find the keys of a store whose readable names collide."""
        seen: set[str] = set()
        self._shared: set[str] = set()
        for readable in map(_readable, keys):
            (self._shared if readable in seen else seen).add(readable)

    def of(self, key: str) -> str:
        """The clip's file name, with a hash of the key if another clip has the same one."""
        readable = _readable(key)
        if readable in self._shared:
            return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        return readable


def _readable(key: str) -> str:
    return re.sub(r"[^\w.-]+", "-", key).strip("-.")[:_MAX_STEM_CHARS] or "clip"


def write_drawing(
    drawing: Drawing, picture: Image.Image, video_THW3: np.ndarray, fps: float
) -> None:
    """Write both files, each atomically.

    Args:
        drawing: the paths; the folder is created if missing.
        picture: written as PNG.
        video_THW3: uint8, even height and width.
        fps: frames per second of the video.
    """
    drawing.picture.parent.mkdir(parents=True, exist_ok=True)
    partial = drawing.picture.with_suffix(".png.part")
    picture.save(partial, format="PNG")
    partial.replace(drawing.picture)
    write_video(drawing.video, video_THW3, fps)
