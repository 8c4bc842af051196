"""Limits on the size of a dataset's entries, against malformed or hostile input."""

from pathlib import Path

MAX_MASK_BYTES = 64 << 20
"""Largest mask image (64 MiB)."""

MAX_JSON_BYTES = 16 << 20
"""Largest JSON of one clip in a tar (16 MiB)."""

MAX_TEXT_BYTES = 64 << 10
"""Longest caption or subject phrase (64 KiB); the text encoder reads at most 226 tokens."""

MAX_FRAME_PIXELS = 1 << 26
"""Largest frame or mask: 67 million pixels, twice an 8K frame."""

MAX_SUBJECTS = 64
"""Maximum number of subjects on one frame of a clip."""

MAX_POINTS = 1024
"""Maximum number of points of one subject."""

MAX_DECODED_FRAMES = 100_000
"""Maximum number of frames decoded per clip: 49 frames at 8 fps from a source of 16,000 fps."""


def read_at_most(path: Path, limit: int, shown: str) -> bytes:
    """Read a file of limited size.

    Args:
        path: The file.
        limit: Maximum size in bytes.
        shown: Name of the file in error messages.

    Raises:
        ValueError: The file is missing, not a regular file, too large, or unreadable.
    """
    try:
        # Reading a pipe or a device might never end.
        if path.exists() and not path.is_file():
            raise ValueError(f"{shown} is not a regular file")
        if path.stat().st_size > limit:
            raise ValueError(f"{shown} has {path.stat().st_size:,} bytes; the limit is {limit:,}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error.strerror}") from error
