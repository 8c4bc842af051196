"""Resizing of source frames and prompts to the training size: scale to cover, then centre crop."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

# Legend: T frame, H W pixels, C colour, N points, 4 box corners x0 y0 x1 y1.

Sampling = Literal["time", "consecutive"]
"""How frames were sampled: the frame shown at each time k / fps, or consecutive frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameGeometry:
    """Transform of a clip from source pixels to training pixels.

    Coordinates are continuous: pixel (0, 0) covers [0, 1) x [0, 1). A source point (x, y) maps to
    ((x - left) * scale_x, (y - top) * scale_y).
    """

    source_height: int
    """Height of the upright source frame, pixels."""
    source_width: int
    height: int
    """Training height, pixels."""
    width: int
    scale_y: float
    """Training pixels per source pixel; differs from scale_x only for non-square pixels."""
    scale_x: float
    top: float
    """Source pixels cropped at the top (and at the bottom)."""
    left: float
    """Source pixels cropped on the left (and on the right)."""
    rotation: int
    """Rotation requested by the file, degrees counter-clockwise."""
    mirrored: bool
    """Whether the file requested a horizontal flip, before the rotation."""
    source_fps: float
    """Frames per second between the first and the last frame taken."""
    sampling: Sampling
    conversions: tuple[str, ...] = ()
    """Other conversions of the source frames (deinterlaced, PQ to SDR, …), and the name of the
    stream if there are several video streams."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, as stored in a clip's attributes."""
        return asdict(self) | {"conversions": list(self.conversions)}

    @property
    def is_identity(self) -> bool:
        """Whether frames are neither scaled nor cropped."""
        return (self.source_height, self.source_width) == (self.height, self.width)

    def frame(self, frame_HWC: np.ndarray) -> np.ndarray:
        """Resample one uint8 [source_height, source_width, 3] frame to [height, width, 3].

        Bicubic, antialiased when downscaling (Pillow's convolution), directly from the exact
        source window: no intermediate size is rounded.
        """
        if self.is_identity:
            return frame_HWC
        return self._resample(Image.fromarray(frame_HWC), Image.Resampling.BICUBIC)

    def mask(self, mask_HW: np.ndarray) -> np.ndarray:
        """Resample a bool [source_height, source_width] mask; pixels at least half covered are set.

        Raises:
            ValueError: The size of the mask differs from that of the source.
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
        """Map float [N, 2] (x, y) source points; results may lie outside the training frame."""
        origin = np.array([self.left, self.top])
        return (points_xy_N2 - origin) * np.array([self.scale_x, self.scale_y])

    def _resample(self, image: Image.Image, resampling: Image.Resampling) -> np.ndarray:
        window = (
            self.left,
            self.top,
            self.source_width - self.left,
            self.source_height - self.top,
        )
        return np.asarray(image.resize((self.width, self.height), resampling, box=window))


def cover_and_crop(
    source_height: int,
    source_width: int,
    *,
    height: int,
    width: int,
    pixel_aspect: float = 1.0,
    rotation: int = 0,
    mirrored: bool = False,
    source_fps: float,
    sampling: Sampling,
) -> FrameGeometry:
    """Use the smallest scale at which the source covers the training frame, and crop the centre.

    Args:
        source_height: Height of the upright source frame, pixels.
        source_width: Width of the upright source frame, pixels.
        height: Training height, pixels.
        width: Training width, pixels.
        pixel_aspect: Width of a source pixel over its height.
        rotation: Degrees by which the file rotates its frames; only recorded.
        mirrored: Whether the file mirrors its frames; only recorded.
        source_fps: Frames per second between the frames taken; only recorded.
        sampling: How frames were sampled; only recorded.
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
        rotation=rotation,
        mirrored=mirrored,
        source_fps=source_fps,
        sampling=sampling,
    )
