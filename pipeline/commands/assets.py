"""The demo's data and models, made before a command that needs them."""

from pipeline.config import RunConfig
from stages.progress import Progress


def make_missing_assets(config: RunConfig, progress: Progress) -> None:
    """Make what is missing of the built-in demo; nothing where the configuration has none."""
    if config.demo is None:
        return
    from stages.articulated_figures.demo import ensure_demo

    ensure_demo(config.demo, config.data, progress=progress)
