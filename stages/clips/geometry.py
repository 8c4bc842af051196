"""How a source frame becomes a training frame: scale to cover, crop the centre.

Used by `stages.clips.loading`; the same transform is applied to prompts.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from stages.clips.orientation import Orientation

# Legend: T frame, H W pixels, C colour, N points, 4 box corners x0 y0 x1 y1.

Sampling = Literal["time", "consecutive"]
"""Which frames were taken: the one shown at each instant k / fps, or one after the other."""


_AS_STORED = Orientation()


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameGeometry:
    """One clip's way from source pixels to training pixels.

    Coordinates are continuous: pixel (0, 0) covers [0, 1) x [0, 1). A source point (x, y) lands at
    ((x - left) * scale_x, (y - top) * scale_y).
    """

    source_height: int
    """Pixels, of the frame as it is shown."""
    source_width: int
    height: int
    """Training size."""
    width: int
    scale_y: float
    """Training pixels per source pixel; differs from scale_x only for non-square pixels."""
    scale_x: float
    top: float
    """Source pixels cropped away above (and below)."""
    left: float
    """Source pixels cropped away on the left (and on the right)."""
    rotation: int
    """Degrees counter-clockwise by which the file asked its frames to be turned."""
    mirrored: bool
    """Whether it asked for left and right to be swapped, before the rotation."""
    source_fps: float
    """Frames per second between the first and the last frame taken."""
    sampling: Sampling
    conversions: tuple[str, ...]
    """What else was done to the source's frames: deinterlaced, PQ to SDR, …; which of several video
    streams they are."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, for a clip's attributes in a store."""
        return asdict(self) | {"conversions": list(self.conversions)}

    @property
    def is_identity(self) -> bool:
        """Whether the frames keep their pixels."""
        return (self.source_height, self.source_width) == (self.height, self.width)

    def frame(self, frame_HWC: np.ndarray) -> np.ndarray:
        """Resample one uint8 [source_height, source_width, 3] frame to [height, width, 3].

        Bicubic, antialiased when it shrinks (Pillow's convolution), straight from the exact
        source window: no intermediate size is rounded.
        """
        if self.is_identity:
            return frame_HWC
        return self._resample(Image.fromarray(frame_HWC), Image.Resampling.BICUBIC)

    def mask(self, mask_HW: np.ndarray) -> np.ndarray:
        """Resample a bool [source_height, source_width] mask: a pixel at least half covered is in.

        Raises:
            ValueError: The mask has another size than the source.
        """
        if mask_HW.shape != (self.source_height, self.source_width):
            raise ValueError(
                f"mask is {mask_HW.shape[0]}x{mask_HW.shape[1]} (HxW) but the video is "
                f"{self.source_height}x{self.source_width}; draw it at the video's own size"
            )
        if self.is_identity:
            return mask_HW
        coverage = Image.fromarray(mask_HW.astype(np.float32))
        return self._resample(coverage, Image.Resampling.BILINEAR) >= 0.5

    def points(self, points_xy_N2: np.ndarray) -> np.ndarray:
        """Map float [N, 2] (x, y) source points; they may land outside the training frame."""
        origin = np.array([self.left, self.top])
        return (points_xy_N2 - origin) * np.array([self.scale_x, self.scale_y])

    def _resample(self, image: Image.Image, filter_: Image.Resampling) -> np.ndarray:
        window = (
            self.left,
            self.top,
            self.source_width - self.left,
            self.source_height - self.top,
        )
        return np.asarray(image.resize((self.width, self.height), filter_, box=window))


def cover_and_crop(
    source_height: int,
    source_width: int,
    *,
    height: int,
    width: int,
    pixel_aspect: float = 1.0,
    orientation: Orientation = _AS_STORED,
    source_fps: float,
    sampling: Sampling,
    conversions: tuple[str, ...] = (),
) -> FrameGeometry:
    """The smallest scale at which the source covers the training frame, centred.

    Args:
        source_height: Source pixels, of the frame as it is shown.
        source_width: Source pixels, of the frame as it is shown.
        height: Training pixels.
        width: Training pixels.
        pixel_aspect: Width of a source pixel over its height.
        orientation: As told by the file, kept for the record.
        source_fps: Between the frames taken, kept for the record.
        sampling: Which frames were taken, kept for the record.
        conversions: What else was done to them, kept for the record.
    """
    scale = max(height / source_height, width / (source_width * pixel_aspect))
    scale_y, scale_x = scale, scale * pixel_aspect
    return FrameGeometry(
        source_height=source_height,
        source_width=source_width,
        height=height,
        width=width,
        scale_y=scale_y,
        scale_x=scale_x,
        top=max(0.0, (source_height - height / scale_y) / 2),
        left=max(0.0, (source_width - width / scale_x) / 2),
        rotation=orientation.rotation,
        mirrored=orientation.mirrored,
        source_fps=source_fps,
        sampling=sampling,
        conversions=conversions,
    )
