"""Fingerprints of the sources of a store's entry: a hash of its inputs and a hash of its video.

A fingerprint has 32 hexadecimal digits. The first 16 are a hash of everything the entry depends on:
if they differ, the entry must be recomputed. The last 16 are a hash of the clip's video, whether or
not the entry depends on it: entries with the same key belong together only if these agree.

Videos are hashed by size and samples, so that a million of them are compared in minutes. Files of
at most 48 KiB are hashed completely; of larger ones 16 KiB each from the start, the middle and the
end. The start contains container headers and the first frame, the end the last frames or the table
of frame sizes, so different encodings differ in size or there. Modification times are ignored: they
change when a file is copied, and can stay the same when a file is replaced.
"""

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stages.clips.records import SubjectPrompt
from stages.clips.video.streams import FilePart, VideoSource, open_source

_HASH_DIGITS = 16
_SAMPLE_BYTES = 16 * 1024

NO_VIDEO = "0" * _HASH_DIGITS
"""Hash of a video that cannot be read."""

NO_CLIP = "f" * _HASH_DIGITS
"""Video hash of a dataset entry that is not a clip."""


def hash_parts(parts: Iterable[bytes | str | None]) -> str:
    """Hash a sequence of values, as 16 digits; None and an empty value have different hashes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(struct.pack("<q", -1 if data is None else len(data)))
        digest.update(data or b"")
    return digest.hexdigest()[:_HASH_DIGITS]


def hash_video(source: VideoSource) -> str:
    """Hash a video by its size and samples of its bytes, as 16 digits; `NO_VIDEO` if unreadable."""
    try:
        with open_source(source) as file:
            size = _size_of(source)
            end_offset = size - _SAMPLE_BYTES
            offsets = (0, end_offset // 2, end_offset) if size > 3 * _SAMPLE_BYTES else (0,)
            length = size if len(offsets) == 1 else _SAMPLE_BYTES
            samples = []
            for offset in offsets:
                file.seek(offset)
                samples.append(file.read(length))
    except OSError:
        return NO_VIDEO
    return hash_parts([struct.pack("<q", size), *samples])


def hash_prompts(prompts: Iterable[SubjectPrompt]) -> str:
    """Hash the subject prompts of a frame, as 16 digits, independently of their file format."""
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


def source_hashes(fingerprints: np.ndarray) -> np.ndarray:
    """The hashes of everything the entries depend on.

    Args:
        fingerprints: S32 [clips].

    Returns:
        S16 [clips], a view.
    """
    return _halves(fingerprints)[:, 0]


def video_hashes(fingerprints: np.ndarray) -> np.ndarray:
    """The hashes of the clips' videos; shapes as in `source_hashes`."""
    return _halves(fingerprints)[:, 1]


def video_hash_in(fingerprint: str) -> str:
    """The hash of the clip's video in one fingerprint."""
    return fingerprint[_HASH_DIGITS:]


def _halves(fingerprints: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(fingerprints).view(f"S{_HASH_DIGITS}").reshape(-1, 2)


def _size_of(source: VideoSource) -> int:
    if isinstance(source, bytes):
        return len(source)
    return source.size if isinstance(source, FilePart) else Path(source).stat().st_size
