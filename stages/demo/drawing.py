"""Rasterisation of capsules and noise textures."""

import numpy as np
from PIL import Image

# Legend: H W pixels, C colour (RGB, 0 to 1), 2 x and y.


def capsule_coverage(
    start_2: np.ndarray, end_2: np.ndarray, radius: float, *, height: int, width: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Coverage of each pixel by a capsule, from its exact distance field.

    Args:
        start_2: Centre of one cap, pixels (x, y); pixel (0, 0) covers [0, 1) x [0, 1).
        end_2: Centre of the other cap.
        radius: Radius of the capsule, pixels.
        height: Frame height, pixels.
        width: Frame width, pixels.

    Returns:
        The window of the frame around the capsule (possibly empty); within it the coverage in 0..1
        and the distance from the axis in radii (0 on the axis, 1 on the edge).
    """
    low = np.floor(np.minimum(start_2, end_2) - radius - 1).astype(int)
    high = np.ceil(np.maximum(start_2, end_2) + radius + 1).astype(int)
    rows = slice(max(low[1], 0), max(min(high[1], height), max(low[1], 0)))
    columns = slice(max(low[0], 0), max(min(high[0], width), max(low[0], 0)))
    y_H1 = np.arange(rows.start, rows.stop)[:, None] + 0.5
    x_1W = np.arange(columns.start, columns.stop)[None, :] + 0.5
    axis = end_2 - start_2
    along = (x_1W - start_2[0]) * axis[0] + (y_H1 - start_2[1]) * axis[1]
    nearest = np.clip(along / max(float(axis @ axis), 1e-9), 0.0, 1.0)
    distance_HW = np.hypot(
        x_1W - start_2[0] - nearest * axis[0], y_H1 - start_2[1] - nearest * axis[1]
    )
    coverage_HW = np.clip(radius + 0.5 - distance_HW, 0.0, 1.0)
    return (rows, columns), coverage_HW, distance_HW / max(radius, 1e-9)


def smooth_noise(
    random: np.random.Generator, height: int, width: int, *, cell: float
) -> np.ndarray:
    """Value noise of three octaves, float64 [height, width], mean about 0, within -1..1.

    Args:
        random: Random generator.
        height: Pixels.
        width: Pixels.
        cell: Grid spacing of the coarsest octave, pixels.
    """
    noise_HW = np.zeros((height, width))
    for octave, weight in enumerate((0.5, 0.3, 0.2)):
        step = max(cell / 2**octave, 1.0)
        shape = (int(np.ceil(height / step)) + 1, int(np.ceil(width / step)) + 1)
        knots = random.uniform(-1.0, 1.0, shape).astype(np.float32)
        smooth = Image.fromarray(knots).resize(
            (width, height), Image.Resampling.BICUBIC, box=(0, 0, width / step, height / step)
        )
        noise_HW += weight * np.asarray(smooth, dtype=np.float64)
    return noise_HW


def scrolled(texture_HWC: np.ndarray, left: float, width: int) -> np.ndarray:
    """A window of `width` pixels that starts at column `left`, interpolated between columns."""
    column = int(np.floor(left))
    fraction = left - column
    near = texture_HWC[:, column : column + width]
    return near * (1 - fraction) + texture_HWC[:, column + 1 : column + 1 + width] * fraction
