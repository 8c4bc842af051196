"""Draws a masks store over its clips' frames, as a video and a contact sheet; used by `inspect`."""

from pathlib import Path

from stages.clips import ClipDataset, ClipsConfig
from stages.inspect_cache.drawing import Drawing
from stages.progress import Progress


def draw_overlay(
    store: Path,
    key: str | None,
    *,
    out_dir: Path,
    clips: ClipsConfig,
    dataset: ClipDataset | None,
    progress: Progress,
) -> Drawing:
    """Draw one clip's tracked masks over its frames.

    Args:
        store: Folder of a masks store.
        key: Which clip; None takes the store's first.
        out_dir: Where `<clip>.overlay.png` and `<clip>.overlay.mp4` are written; made when missing.
        clips: The clips' length, size and rate, as at extraction.
        dataset: Where the frames come from; None draws the masks on grey.
        progress: Told of the steps.

    Raises:
        CacheError: No such clip, or one that does not pass its checks.
        ValueError: A store of another kind, without clips, or of other clips than `clips` says.
    """
    raise NotImplementedError("being written")
