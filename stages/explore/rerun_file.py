"""A chosen handful of clips as a recording for the Rerun viewer (https://rerun.io).

A recording has one branch of entities per clip, named by its key:

    frames                             the clip's frames
    frames/tracks/forward, …/backward  masks of the tracks
    frames/flow/forward, …             arrows of the implied flow, of a pair on its first frame
    components/fused, …                principal components of features
    valid                              1 where training uses the frame, else 0
    quality/…                          recorded numbers, such as cycle consistency; not in time
    caption, facts                     plain text; not in time

Timelines are `frame`, the clip's frame, and `time`, in seconds at the clip's rate.
"""

# Legend: T frame, H W pixels, C colour; P pair of maps, h w token grid.

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from cache_schema.atomic_io import make_directories
from stages.explore.explorer import Explorer
from stages.explore.export import rows_of
from stages.explore.flow_view import FlowView
from stages.explore.layers import MASK_COLOURS, MASK_HALF, ClipLayers, Layer
from stages.explore.table import NUMBERS
from stages.progress import Progress

SUFFIX = ".rrd"
_CLASSES = {direction: number for number, direction in enumerate(MASK_COLOURS, 1)}
"""Class of each track's pixels; 0 is the background."""


def import_rerun() -> Any:
    """Import the Rerun SDK.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import rerun
    except ImportError as error:
        raise ValueError(
            f'--export to a {SUFFIX} file needs the Rerun SDK: pip install "sam2videox[rerun]", or '
            "export to a page, such as clips.html"
        ) from error
    return rerun


def write_recording(explorer: Explorer, keys: Sequence[str], out: Path, progress: Progress) -> None:
    """Write the recording; a file of that name is replaced when it is complete.

    Args:
        explorer: Of the cache; its table has been read.
        keys: Keys of the clips.
        out: The file.
        progress: Advanced once per clip.

    Raises:
        ValueError: The Rerun SDK is missing; or as `rows_of`.
    """
    rr = import_rerun()
    rows = rows_of(explorer, keys)
    make_directories(out.parent)
    partial = out.with_name(f".{out.name}.partial")
    try:
        rr.set_strict_mode(True)  # what cannot be logged is an error, not a warning
        recording = rr.RecordingStream("sam2videox")
        recording.save(partial)
        with progress.task("export", len(rows), unit="clips") as task:
            for key, row in zip(keys, rows, strict=True):
                _Clip(rr, recording, key).log(explorer, row)
                task.advance()
        recording.flush()
        recording.disconnect()
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


class _Clip:
    """Logs one clip."""

    def __init__(self, rr: Any, recording: Any, key: str) -> None:
        self._rr = rr
        self._recording = recording
        self._key = key
        self._fps = 1.0

    def log(self, explorer: Explorer, row: int) -> None:
        """Log everything that is known of the clip."""
        rr, layers = self._rr, explorer.layers(row)
        self._fps = layers.fps
        self._always("facts", self._text("\n".join([*explorer.clip(row)["facts"], *layers.notes])))
        if (caption := explorer.table.caption(row)) is not None:
            self._always("caption", self._text(caption))
        for name in NUMBERS:
            if (value := explorer.table.number(name, row)) is not None:
                self._always(f"quality/{name}", rr.Scalars(value))
        size = self._frames(layers)
        self._tracks(layers, size)
        for name, layer in layers.layers.items():
            if name.startswith("components_"):
                for moment, picture in _pictures(layer):
                    part = name.removeprefix("components_")
                    self._at(moment, f"components/{part}", rr.Image(picture))
        if layers.flow is not None:
            self._flow(layers.flow, explorer.sources.lgf.temperature, size)

    def _frames(self, layers: ClipLayers) -> tuple[int, int]:
        """Log the frames; returns width and height of what overlays are drawn on."""
        frames = layers.layers.get("frames")
        for moment, picture in _pictures(frames) if frames is not None else ():
            self._at(moment, "frames", self._rr.Image(picture).compress())
        shown = frames or next(iter(layers.layers.values()), None)
        return (1, 1) if shown is None else (shown.sheet.width, shown.sheet.height)

    def _tracks(self, layers: ClipLayers, size: tuple[int, int]) -> None:
        rr = self._rr
        classes = [
            (number, f"{direction} track", ImageColor.getrgb(MASK_COLOURS[direction]))
            for direction, number in _CLASSES.items()
        ]
        context = rr.AnnotationContext([(0, "background", (0, 0, 0, 0)), *classes])
        self._always("frames/tracks", context)
        for direction, number in _CLASSES.items():
            layer = layers.layers.get(f"mask_{direction}")
            for moment, mask in _pictures(layer) if layer is not None else ():
                inside = Image.fromarray(np.uint8(number) * (mask >= MASK_HALF))
                inside_HW = np.asarray(inside.resize(size, Image.Resampling.NEAREST))
                picture = rr.SegmentationImage(inside_HW, opacity=0.5)
                self._at(moment, f"frames/tracks/{direction}", picture)
        if layers.valid_T is not None:
            for moment, valid in enumerate(layers.valid_T.tolist()):
                self._at(moment, "valid", rr.Scalars(float(valid)))

    def _flow(self, flow: FlowView, temperature: float, size: tuple[int, int]) -> None:
        """Arrows from the middle of each token, in pixels of the frames."""
        for direction in flow.by_direction:
            motion_Phw2 = flow.motion(direction, temperature)
            pairs, height, width, _ = motion_Phw2.shape
            per_token_2 = np.array([size[0] / width, size[1] / height], np.float32)
            rows_hw, columns_hw = np.mgrid[:height, :width]
            origins_N2 = (np.stack([columns_hw, rows_hw], -1).reshape(-1, 2) + 0.5) * per_token_2
            for pair in range(pairs):
                # A backward pair goes from its second map to its first.
                moment = flow.moments[pair + (direction == "backward")]
                vectors_N2 = motion_Phw2[pair].reshape(-1, 2) * per_token_2
                arrows = self._rr.Arrows2D(origins=origins_N2, vectors=vectors_N2)
                self._at(moment, f"frames/flow/{direction}", arrows)

    def _text(self, text: str) -> Any:
        # Never Markdown, which can load pictures from elsewhere.
        return self._rr.TextDocument(text, media_type="text/plain")

    def _at(self, moment: int, entity: str, what: Any) -> None:
        self._recording.set_time("frame", sequence=moment)
        self._recording.set_time("time", duration=moment / self._fps)
        self._recording.log(self._path(entity), what)

    def _always(self, entity: str, what: Any) -> None:
        self._recording.log(self._path(entity), what, static=True)

    def _path(self, entity: str) -> list[str]:
        return [self._key, *entity.split("/")]


def _pictures(layer: Layer) -> Iterator[tuple[int, np.ndarray]]:
    """The clip's frame and the pixels of each picture of a layer: uint8 [H, W] or [H, W, C]."""
    sheet = layer.sheet
    pixels = np.asarray(Image.open(io.BytesIO(sheet.data)))
    for number, moment in enumerate(layer.moments):
        row, column = divmod(number, sheet.columns)
        top, left = row * sheet.height, column * sheet.width
        yield moment, pixels[top : top + sheet.height, left : left + sheet.width]
