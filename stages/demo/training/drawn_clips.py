"""Drawn clips for training, of seeds that neither the demo nor the held-out scores use."""

import numpy as np

from stages.demo.scenes import FigureClip, draw_clip

NUM_FRAMES, HEIGHT, WIDTH = 17, 128, 192
"""Size of the demo's clips."""
NUM_KINDS = 3
"""Kinds of figure, which cycle with the seed."""
TRAINING_SEEDS = range(1_000_000, 2**31)
"""Seeds of training clips. The demo's clips and the held-out ones have smaller seeds."""
HELD_OUT_SEEDS = range(500_000, 1_000_000)
"""Seeds of clips that no model is trained on."""


def training_seed(index: int, *, run_seed: int) -> int:
    """Seed of a run's `index`-th clip."""
    bounds = TRAINING_SEEDS.start, TRAINING_SEEDS.stop // 2
    seed = int(np.random.default_rng(run_seed).integers(*bounds)) + index
    assert seed in TRAINING_SEEDS
    return seed


def draw_demo_clip(
    seed: int, *, fps: float, height: int = HEIGHT, width: int = WIDTH
) -> FigureClip:
    """Draw a clip of the demo's length, and of its size unless another is given."""
    return draw_clip(seed, num_frames=NUM_FRAMES, height=height, width=width, fps=fps)
