"""The Local Gram Flow as float64 loops over numpy arrays, written from its definition."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def similarities_by_loop(
    features_BTHWC: Array, radius: int, *, backward: bool = False
) -> tuple[Array, NDArray[np.bool_]]:
    """Similarities [B, T-1, H, W, K] and which of them lie inside the grid, one pair at a time.

    `backward`: of the second frame's tokens to windows in the first.
    """
    B, T, H, W, _ = features_BTHWC.shape
    side = 2 * radius + 1
    values = np.zeros((B, T - 1, H, W, side * side))
    inside = np.zeros(values.shape, dtype=bool)
    for b, t, y, x in np.ndindex(B, T - 1, H, W):
        first, second = (t + 1, t) if backward else (t, t + 1)
        token = features_BTHWC[b, first, y, x]
        for k, (row, column) in enumerate(np.ndindex(side, side)):
            ny, nx = y + row - radius, x + column - radius
            if 0 <= ny < H and 0 <= nx < W:
                other = features_BTHWC[b, second, ny, nx]
                norm = np.linalg.norm(token) * np.linalg.norm(other)
                values[b, t, y, x, k] = token @ other / norm
                inside[b, t, y, x, k] = True
    return values, inside


def kl_by_loop(
    student: Array, teacher: Array, inside: NDArray[np.bool_], temperature: float
) -> float:
    """Mean over tokens of KL(teacher || student) of softmaxes over the neighbours inside."""
    total, count = 0.0, 0
    for index in np.ndindex(student.shape[:-1]):
        keep = inside[index]
        p = _softmax(teacher[index][keep] / temperature)
        q = _softmax(student[index][keep] / temperature)
        total += float(np.sum(p * (np.log(p) - np.log(q))))
        count += 1
    return total / count


def l2_by_loop(student: Array, teacher: Array, inside: NDArray[np.bool_]) -> float:
    """Mean over tokens of the mean squared difference over the neighbours inside."""
    per_token = [
        float(np.mean((student[i][inside[i]] - teacher[i][inside[i]]) ** 2))
        for i in np.ndindex(student.shape[:-1])
    ]
    return float(np.mean(per_token))


def entropy_by_loop(values: Array, inside: NDArray[np.bool_], temperature: float) -> Array:
    """Entropy of each token's flow, divided by that of a uniform choice."""
    entropy = np.zeros(values.shape[:-1])
    for index in np.ndindex(values.shape[:-1]):
        p = _softmax(values[index][inside[index]] / temperature)
        entropy[index] = -sum(v * np.log(v) for v in p if v > 0) / np.log(len(p))
    return entropy


def flow_by_loop(
    values: Array, inside: NDArray[np.bool_], radius: int, temperature: float
) -> Array:
    """Expected (dx, dy) per token."""
    side = 2 * radius + 1
    offsets = np.array([(c - radius, r - radius) for r, c in np.ndindex(side, side)], dtype=float)
    flow = np.zeros((*values.shape[:-1], 2))
    for index in np.ndindex(values.shape[:-1]):
        keep = inside[index]
        flow[index] = _softmax(values[index][keep] / temperature) @ offsets[keep]
    return flow


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
