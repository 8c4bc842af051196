"""Grids, latent rate and Gram flow in float64, written out; for the tests of stored features."""

# Legend: T frame, C channel, H W grid.

import numpy as np

RADIUS = 2


def on_grid(raw_TCHW: np.ndarray, height: int, width: int) -> np.ndarray:
    """[T, height, width, C] in float64: bilinear at cell centres, antialiased by a triangle as wide
    as a target cell where the grid gets coarser, renormalised at the edges.
    """

    def weights(source: int, target: int) -> np.ndarray:
        scale = source / target
        support = max(scale, 1.0)
        centres = (np.arange(target) + 0.5) * scale
        distance = np.abs(centres[:, None] - (np.arange(source) + 0.5)[None]) / support
        triangle = np.clip(1 - distance, 0, None)
        return triangle / triangle.sum(axis=1, keepdims=True)

    rows, columns = weights(raw_TCHW.shape[2], height), weights(raw_TCHW.shape[3], width)
    return np.einsum("yh,xw,tchw->tyxc", rows, columns, raw_TCHW.astype(np.float64))


def gram_flow(features_THWC: np.ndarray) -> np.ndarray:
    """Products of unit tokens with the next frame's neighbours, by loops; 0 outside the grid."""
    unit = features_THWC / np.linalg.norm(features_THWC, axis=-1, keepdims=True)
    frames, height, width, _ = unit.shape
    side = 2 * RADIUS + 1
    flow = np.zeros((frames - 1, height, width, side * side))
    for t, y, x, k in np.ndindex(flow.shape):
        ny, nx = y + k // side - RADIUS, x + k % side - RADIUS
        if 0 <= ny < height and 0 <= nx < width:
            flow[t, y, x, k] = unit[t, y, x] @ unit[t + 1, ny, nx]
    return flow


def latent_means(features_THWC: np.ndarray) -> np.ndarray:
    groups = [[0]] + [
        list(range(4 * k - 3, 4 * k + 1)) for k in range(1, len(features_THWC) // 4 + 1)
    ]
    return np.stack([features_THWC[group].mean(axis=0) for group in groups])
