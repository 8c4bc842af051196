"""Frames as pictures that a page shows: sheets of all frames, thumbnails, and short loops."""

# Legend: T frame, H W pixels, C colour.

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

_LONG_SIDE = 640
"""Of a frame on a sheet, in pixels at most."""
_THUMBNAIL_WIDTH = 192
_MAX_LOOP_FRAMES = 17
_JPEG_QUALITY, _WEBP_QUALITY = 88, 70

Encoding = Literal["JPEG", "PNG"]
MIME = {"JPEG": "image/jpeg", "PNG": "image/png"}
"""Media type of each encoding of a sheet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """All frames of a clip side by side in one picture, row by row."""

    data: bytes
    media_type: str
    columns: int
    width: int
    """Of one frame, in pixels; so is `height`."""
    height: int


def make_sheet(frames: np.ndarray, encoding: Encoding) -> Sheet:
    """Put the frames of a clip on one sheet.

    Args:
        frames: uint8 [T, H, W] or [T, H, W, 3].
        encoding: JPEG for photographs, which are scaled to 640 pixels on their long side at most;
            PNG for values, kept as they are.
    """
    if encoding == "JPEG":
        scale = min(1.0, _LONG_SIDE / max(frames.shape[1:3]))
        frames = np.stack([_resized(frame, scale, Image.Resampling.BOX) for frame in frames])
    count, height, width = frames.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, *frames.shape[1:]), np.uint8)
    sheet[:count] = frames
    tiled = sheet.reshape(rows, columns, *frames.shape[1:]).swapaxes(1, 2)
    picture = Image.fromarray(tiled.reshape(rows * height, columns * width, *frames.shape[3:]))
    out = io.BytesIO()
    picture.save(out, format=encoding, quality=_JPEG_QUALITY)
    return Sheet(
        data=out.getvalue(),
        media_type=MIME[encoding],
        columns=columns,
        width=width,
        height=height,
    )


def make_thumbnail(frames_THWC: np.ndarray, fps: float) -> tuple[bytes, bytes]:
    """Make a small still of the middle frame and a small animation, both as WebP.

    Args:
        frames_THWC: uint8; frames narrower than a thumbnail are enlarged without smoothing.
        fps: Frames per second.
    """
    count, _, width = frames_THWC.shape[:3]
    stride = math.ceil(count / _MAX_LOOP_FRAMES)
    scale = _THUMBNAIL_WIDTH / width
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    loop = [Image.fromarray(_resized(frame, scale, method)) for frame in frames_THWC[::stride]]
    still, animation = io.BytesIO(), io.BytesIO()
    loop[len(loop) // 2].save(still, format="WEBP", quality=_WEBP_QUALITY)
    loop[0].save(
        animation,
        format="WEBP",
        quality=_WEBP_QUALITY,
        method=1,
        save_all=True,
        append_images=loop[1:],
        duration=round(1000 * stride / fps),
        loop=0,
    )
    return still.getvalue(), animation.getvalue()


def _resized(frame: np.ndarray, scale: float, method: Image.Resampling) -> np.ndarray:
    if scale == 1.0:
        return frame
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return np.asarray(Image.fromarray(frame).resize(size, method))
