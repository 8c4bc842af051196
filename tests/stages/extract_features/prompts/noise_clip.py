"""A clip of noise to choose prompts for."""

from typing import Any

import numpy as np

from stages.clips import Clip
from stages.clips.geometry import cover_and_crop

HEIGHT, WIDTH, NUM_FRAMES = 48, 64, 9


def make_clip(**fields: Any) -> Clip:
    """A clip of noise; its other fields as given."""
    noise = np.random.default_rng(0)
    frames = noise.integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    geometry = cover_and_crop(
        HEIGHT, WIDTH, height=HEIGHT, width=WIDTH, source_fps=8.0, sampling="consecutive"
    )
    return Clip(**{"key": "clip", "frames_THWC": frames, "geometry": geometry, **fields})
