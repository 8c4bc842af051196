"""How much of a dataset's entry is read: bounds on what bad or hostile input can make us hold.

Used by every reader of `stages.clips`; what exceeds one is recorded with its number.
"""

MAX_VIDEO_BYTES = 1 << 30
"""Largest video inside a tar (1 GiB): it is held in memory."""

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
