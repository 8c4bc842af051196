"""The demo's data and models, made before a command that needs them."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import RunConfig
from stages.progress import Progress


def make_missing_assets(config: RunConfig, progress: Progress) -> None:
    """Make what is missing of the built-in demo; nothing where the configuration has none.

    Processes take turns, so that several started at once make it once.
    """
    if config.demo is None:
        return
    from stages.articulated_figures.demo import ensure_demo

    with _alone_in(config.demo.root):
        ensure_demo(config.demo, config.data, progress=progress)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
