"""The demo's data and models, made before a command that needs them."""

import os

from pipeline.config import RunConfig
from stages.progress import Progress


def make_missing_assets(config: RunConfig, progress: Progress) -> None:
    """Make what is missing of the built-in demo; nothing where the configuration has none.

    Models this small gain little from a second thread, and where another program wants the
    processor, waiting for each other slows them down tenfold; so the demo computes on one, unless
    OMP_NUM_THREADS says otherwise.
    """
    if config.demo is None:
        return
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
    from stages.articulated_figures.demo import ensure_demo

    ensure_demo(config.demo, config.data, progress=progress)
