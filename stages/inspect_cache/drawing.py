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


class FileStems:
    """File names of clips that lead out of no folder, each clip's its own."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Take the keys of all clips of a store."""
        seen: set[str] = set()
        self._shared: set[str] = set()
        for readable in map(_readable, keys):
            (self._shared if readable in seen else seen).add(readable)

    def of(self, key: str) -> str:
        """The clip's name; with a digest of the key where another one reads alike."""
        readable = _readable(key)
        if readable in self._shared:
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
