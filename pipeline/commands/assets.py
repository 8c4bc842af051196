"""The demo's data and models, made before a command that reads them."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.load import RunConfig
from stages.demo.build import DemoPart, demo_paths
from stages.extract_features.config import Kind
from stages.progress import Progress

PARTS_OF_KIND: dict[Kind, DemoPart] = {
    "text": "cogvideox",
    "latents": "cogvideox",
    "teacher": "sam2",
    "gram_flow": "sam2",
    "masks": "sam2",
}
"""Which of the demo's models a kind of store is computed with."""


def make_missing_assets(
    config: RunConfig, progress: Progress, *, reads: Sequence[DemoPart]
) -> None:
    """Make what a command reads of the built-in demo and is missing; nothing without a demo.

    What the settings place elsewhere (`data.path`, `model.path`, `extract.teacher.checkpoint`) is
    not made.

    Models this small gain little from a second thread, and where another program wants the
    processor, waiting for each other slows them down tenfold; so the demo computes on one, unless
    OMP_NUM_THREADS says otherwise.
    """
    parts = [part for part in reads if is_of_demo(config, part)]
    if config.demo is None or not parts:
        return
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
    from stages.demo.build import ensure_demo

    ensure_demo(config.demo, config.data, parts=parts, progress=progress)


def is_of_demo(config: RunConfig, part: DemoPart) -> bool:
    """Whether the settings name the demo's own part, made or not."""
    if config.demo is None:
        return False
    paths = demo_paths(config.demo.root.expanduser())
    teacher = config.extract.teacher
    named: dict[DemoPart, list[tuple[str | Path | None, Path]]] = {
        "clips": [(config.data.path, paths.clips)],
        "cogvideox": [(config.model.path, paths.base_model)],
        "sam2": [
            (teacher.checkpoint, paths.sam2_checkpoint),
            (teacher.config, paths.sam2_config),
        ],
    }
    return any(
        path is not None and Path(path).expanduser().resolve() == of_demo.resolve()
        for path, of_demo in named[part]
    )
