"""How much of a dataset's entry is read: bounds on what bad or hostile input can make us hold."""

from pathlib import Path

MAX_MASK_BYTES = 64 << 20
"""Largest mask image (64 MiB)."""

MAX_JSON_BYTES = 16 << 20
"""Largest JSON of one clip in a tar (16 MiB)."""

MAX_TEXT_BYTES = 64 << 10
"""Longest caption or subject (64 KiB); the text encoder reads 226 tokens of it."""

MAX_FRAME_PIXELS = 1 << 26
"""Largest frame or mask: 67 million pixels, twice an 8K frame."""

MAX_SUBJECTS = 64
"""Most subjects of one clip on one frame."""

MAX_POINTS = 1024
"""Most points of one subject."""

MAX_DECODED_FRAMES = 100_000
"""Most frames decoded to make one clip: 49 frames at 8/s of a source with 16,000 frames/s."""


def read_at_most(path: Path, limit: int, shown: str) -> bytes:
    """A file's content.

    Args:
        path: The file.
        limit: Most bytes it may have.
        shown: What messages call it.

    Raises:
        ValueError: It is missing, no regular file, larger, or cannot be read.
    """
    try:
        # A pipe or a device would be read for ever.
        if path.exists() and not path.is_file():
            raise ValueError(f"{shown} is no file")
        if path.stat().st_size > limit:
            raise ValueError(f"{shown} has {path.stat().st_size:,} bytes, at most {limit:,} fit")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error.strerror}") from error
