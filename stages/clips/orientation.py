"""Orientation of frames (rotation and mirroring), from a file's display matrix."""

import math
from dataclasses import dataclass

import numpy as np

# Legend: H W pixels, C colour.

_SCALE_TOLERANCE = 0.01
"""Scales within 1% count as equal. FFmpeg's demuxer uses the same threshold, above which it
converts unequal scales to a pixel aspect ratio."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight orientations on the pixel grid: mirrored first, then rotated."""

    rotation: int = 0
    """Degrees counter-clockwise: 0, 90, 180 or 270."""
    mirrored: bool = False
    """Whether the frame is flipped horizontally, before the rotation."""

    def upright(self, image_HWC: np.ndarray) -> np.ndarray:
        """Apply the orientation; returns a contiguous array."""
        mirrored_HWC = image_HWC[:, ::-1] if self.mirrored else image_HWC
        return np.ascontiguousarray(np.rot90(mirrored_HWC, self.rotation // 90))


def orientation_of(matrix: np.ndarray | None) -> Orientation:
    """The orientation given by a 3x3 display matrix; None stands for the identity.

    Args:
        matrix: int32 [9], (a, b, u, c, d, v, x, y, w) as in FFmpeg and ISO/IEC 14496-12: a stored
            (X, Y) is shown at (aX + cY + x, bX + dY + y). Translation and scale are ignored.

    Raises:
        ValueError: The matrix shears, rotates by another angle, is projective or degenerate.
    """
    if matrix is None:
        return Orientation()
    a, b, u, c, d, v, _, _, _ = (int(value) for value in matrix)
    if u or v:
        raise ValueError("the file's display matrix has a perspective component")
    if a and d and not b and not c:
        x_scale, y_scale = abs(a), abs(d)
        diagonal = {(1, 1): (0, False), (-1, -1): (180, False), (-1, 1): (0, True)}
        found = diagonal.get((_sign(a), _sign(d)), (180, True))
    elif b and c and not a and not d:
        x_scale, y_scale = abs(c), abs(b)
        transposed = {(1, -1): (90, False), (-1, 1): (270, False), (1, 1): (90, True)}
        found = transposed.get((_sign(c), _sign(b)), (270, True))
        if not math.isclose(x_scale, y_scale, rel_tol=_SCALE_TOLERANCE):
            raise ValueError("the file's display matrix rotates frames and scales them unevenly")
    else:
        raise ValueError(
            "the file's display matrix "
            f"({a / 65536:g}, {b / 65536:g}, {c / 65536:g}, {d / 65536:g}) is neither a rotation "
            "by a multiple of 90 degrees nor a mirroring"
        )
    return Orientation(*found)


def _sign(value: int) -> int:
    return 1 if value > 0 else -1
