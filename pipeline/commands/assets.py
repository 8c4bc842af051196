"""The demo's data and models, generated when missing."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.load import RunConfig
from stages.demo.build import DemoPart, demo_paths
from stages.extract_features.config import Kind
from stages.progress import Progress

PARTS_OF_KIND: dict[Kind, DemoPart] = {
    "text": "base_model",
    "latents": "base_model",
    "teacher": "sam2",
    "gram_flow": "sam2",
    "masks": "sam2",
}
"""The demo model that each kind of store is computed with; there is none for visual."""


def make_missing_assets(
    config: RunConfig, progress: Progress, *, reads: Sequence[DemoPart]
) -> None:
    """Generate the missing parts of the built-in demo that a command reads.

    Does nothing without a demo section, nor for parts that the settings do not use (`data.path`,
    `model.path` or `extract.teacher.checkpoint` point elsewhere).
    """
    parts = [part for part in reads if uses_demo_part(config, part)]
    if config.demo is None or not parts:
        return
    from stages.demo.build import ensure_demo

    ensure_demo(config.demo, config.data, parts=parts, progress=progress)


def limit_threads(config: RunConfig) -> None:
    """Let torch compute on one thread where the demo's models do, unless OMP_NUM_THREADS is set.

    In the environment, for processes that are started later too; torch must not be imported yet.
    A second thread gains such models up to half of the time on an idle machine, and makes tracking
    several times slower beside other processes (`tests/benchmarks/demo_threads.md`).
    """
    if uses_demo_part(config, "base_model") or uses_demo_part(config, "sam2"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def uses_demo_part(config: RunConfig, part: DemoPart) -> bool:
    """Whether the settings point to the demo's own part, generated or not."""
    if config.demo is None:
        return False
    paths = demo_paths(config.demo.root.expanduser(), config.demo.student)
    teacher = config.extract.teacher
    named: dict[DemoPart, list[tuple[str | Path | None, Path]]] = {
        "clips": [(config.data.path, paths.clips)],
        "base_model": [(config.model.path, paths.base_model)],
        "sam2": [
            (teacher.checkpoint, paths.sam2_checkpoint),
            (teacher.config, paths.sam2_config),
        ],
    }
    return any(
        path is not None and Path(path).expanduser().resolve() == demo_path.resolve()
        for path, demo_path in named[part]
    )
