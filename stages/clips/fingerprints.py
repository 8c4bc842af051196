"""What stands in a store for the sources of a clip's entry: hashes of the video and of the rest.

A fingerprint has 32 hexadecimal digits. The first 16 are a hash of whatever the entry depends on:
where they differ, the entry must be made again. The last 16 are a hash of the clip's video, whether
the entry depends on it or not: entries of one key belong together only where these agree.

A video is told by its size and three samples, so that a million of them take minutes to compare:
any file of at most 48 KiB is hashed whole; of a larger one, 16 KiB each from the start, the middle
and the end. The start holds container headers and the first frame, the end the last frames or the
table of all frames' sizes, so two encodings differ in size or there. Times of modification are not
looked at: a copy has others, and a file that was put in place of another can have the same.
"""

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stages.clips.prompts import SubjectPrompt
from stages.clips.video_source import FilePart, VideoSource, open_source

_HALF = 16
_SAMPLE_BYTES = 16 * 1024

NO_VIDEO = "0" * _HALF
"""Stands for a video that cannot be read."""

NO_CLIP = "f" * _HALF
"""Stands for the video of an entry of the dataset that is no clip."""


def hash_parts(parts: Iterable[bytes | str | None]) -> str:
    """16 digits for some pieces of data in order; None differs from an empty one."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(struct.pack("<q", -1 if data is None else len(data)))
        digest.update(data or b"")
    return digest.hexdigest()[:_HALF]


def hash_video(source: VideoSource) -> str:
    """16 digits for a video, from its size and samples of its bytes; `NO_VIDEO` if unreadable."""
    try:
        with open_source(source) as file:
            size = _size_of(source)
            spare = size - _SAMPLE_BYTES
            offsets = (0, spare // 2, spare) if size > 3 * _SAMPLE_BYTES else (0,)
            length = size if len(offsets) == 1 else _SAMPLE_BYTES
            samples = []
            for offset in offsets:
                file.seek(offset)
                samples.append(file.read(length))
    except OSError:
        return NO_VIDEO
    return hash_parts([struct.pack("<q", size), *samples])


def hash_prompts(prompts: Iterable[SubjectPrompt]) -> str:
    """16 digits for subjects of a frame: what is prompted, whatever file it was read from."""
    parts: list[bytes | None] = []
    for prompt in prompts:
        box, mask_HW = prompt.box_xyxy, prompt.mask_HW
        parts += [
            None if box is None else struct.pack("<4d", *box),
            None if mask_HW is None else struct.pack("<2q", *mask_HW.shape),
            None if mask_HW is None else np.packbits(mask_HW).tobytes(),
            None if prompt.points_xy is None else prompt.points_xy.astype("<f8").tobytes(),
            None if prompt.point_labels is None else prompt.point_labels.astype("<i8").tobytes(),
        ]
    return hash_parts(parts)


def sources_half(fingerprints: np.ndarray) -> np.ndarray:
    """The part that says whether an entry must be made again.

    Args:
        fingerprints: S32 [clips].

    Returns:
        S16 [clips], a view.
    """
    return _halves(fingerprints)[:, 0]


def video_half(fingerprints: np.ndarray) -> np.ndarray:
    """The part that says which entries of a key belong together; as `sources_half`."""
    return _halves(fingerprints)[:, 1]


def _halves(fingerprints: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(fingerprints).view(f"S{_HALF}").reshape(-1, 2)


def _size_of(source: VideoSource) -> int:
    if isinstance(source, bytes):
        return len(source)
    return source.size if isinstance(source, FilePart) else Path(source).stat().st_size
