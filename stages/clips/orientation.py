"""How a file asks its frames to be shown: turned, mirrored, or both, by its display matrix."""

import math
from dataclasses import dataclass

import numpy as np

# Legend: H W pixels, C colour.

_EVEN_SCALES = 0.01
"""Two scales within 1% are one; FFmpeg's demuxer, which turns uneven ones into a pixel aspect,
draws the line there too."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight ways to lay a frame on its pixel grid: mirrored first, then turned."""

    rotation: int = 0
    """Degrees counter-clockwise: 0, 90, 180 or 270."""
    mirrored: bool = False
    """Left and right are swapped, before the rotation."""

    def upright(self, image_HWC: np.ndarray) -> np.ndarray:
        """The image as it is to be shown; contiguous."""
        mirrored_HWC = image_HWC[:, ::-1] if self.mirrored else image_HWC
        return np.ascontiguousarray(np.rot90(mirrored_HWC, self.rotation // 90))


def orientation_of(matrix: np.ndarray | None) -> Orientation:
    """What a 3x3 display matrix asks for; None, no matrix, asks for nothing.

    Args:
        matrix: int32 [9], (a, b, u, c, d, v, x, y, w) as FFmpeg and ISO/IEC 14496-12 have it: a
            stored (X, Y) is shown at (aX + cY + x, bX + dY + y). Shifts and scales are ignored.

    Raises:
        ValueError: It shears, turns by another angle, distorts, or shows nothing.
    """
    if matrix is None:
        return Orientation()
    a, b, u, c, d, v, _, _, _ = (int(value) for value in matrix)
    if u or v:
        raise ValueError("the file's display matrix distorts its frames by a perspective")
    if a and d and not b and not c:
        x_scale, y_scale = abs(a), abs(d)
        straight = {(1, 1): (0, False), (-1, -1): (180, False), (-1, 1): (0, True)}
        found = straight.get((_sign(a), _sign(d)), (180, True))
    elif b and c and not a and not d:
        x_scale, y_scale = abs(c), abs(b)
        across = {(1, -1): (90, False), (-1, 1): (270, False), (1, 1): (90, True)}
        found = across.get((_sign(c), _sign(b)), (270, True))
        if not math.isclose(x_scale, y_scale, rel_tol=_EVEN_SCALES):
            raise ValueError("the file's display matrix turns its frames and stretches them")
    else:
        raise ValueError(
            "the file's display matrix does not lay pixels on pixels: "
            f"({a / 65536:g}, {b / 65536:g}, {c / 65536:g}, {d / 65536:g}) is neither a rotation "
            "by 90s nor a mirroring"
        )
    return Orientation(*found)


def _sign(value: int) -> int:
    return 1 if value > 0 else -1
