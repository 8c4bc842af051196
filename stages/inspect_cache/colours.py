"""Colours of features (PCA over a whole clip) and of flow vectors."""

import numpy as np
from matplotlib.colors import hsv_to_rgb

# Legend: T frame, H W token grid, C channel, N = T * H * W tokens; the last axis of a flow is
# (dx, dy), x to the right, y downwards.


def pca_colours(features_THWC: np.ndarray, valid_T: np.ndarray | None = None) -> np.ndarray:
    """Colour tokens by their first three principal components: uint8 [T, H, W, 3].

    The components are fitted to all valid tokens of the clip, so that a part keeps its colour while
    it moves. Their signs are fixed (the largest weight is positive), so that the result is
    reproducible. Each component's 1st to 99th percentile spans the range of its colour.

    Args:
        features_THWC: any real dtype; with fewer than three channels, the other colours are 0.5.
        valid_T: bool, the moments to fit to; None, or all False, uses every moment.

    Raises:
        ValueError: not four axes, or NaN or infinite values.
    """
    if features_THWC.ndim != 4:
        raise ValueError(f"features must be [T, H, W, C], got shape {features_THWC.shape}")
    tokens_NC = features_THWC.reshape(-1, features_THWC.shape[-1]).astype(np.float32)
    if not np.isfinite(tokens_NC).all():
        raise ValueError("features are NaN or infinite; extract the clip again")
    if valid_T is None or not valid_T.any():
        valid_T = np.ones(len(features_THWC), bool)
    fitted_N = np.repeat(valid_T, len(tokens_NC) // len(valid_T))
    tokens_NC -= tokens_NC[fitted_N].mean(axis=0)
    fitted_NC = tokens_NC[fitted_N]
    covariance_CC = (fitted_NC.T @ fitted_NC).astype(np.float64) / len(fitted_NC)
    _, components_CC = np.linalg.eigh(covariance_CC)
    components_C3 = components_CC[:, ::-1][:, :3]
    largest = np.abs(components_C3).argmax(axis=0)
    components_C3 = components_C3 * np.sign(components_C3[largest, range(components_C3.shape[1])])
    colours_N3 = np.full((len(tokens_NC), 3), 0.5)
    projected = tokens_NC @ components_C3
    low, high = np.percentile(projected[fitted_N], [1, 99], axis=0)
    spread = high - low
    seen = spread > 1e-6 * max(float(spread.max()), 1e-12)
    scaled = (projected - low) / np.where(seen, spread, 1.0)
    colours_N3[:, : projected.shape[1]][:, seen] = scaled[:, seen]
    colours = (np.clip(colours_N3, 0.0, 1.0) * 255).round().astype(np.uint8)
    return colours.reshape(*features_THWC.shape[:3], 3)


def flow_colours(flow_HW2: np.ndarray, largest: float) -> np.ndarray:
    """Colour vectors by direction (hue) and length (saturation): uint8 [H, W, 3], white if still.

    Args:
        flow_HW2: (dx, dy) in any unit.
        largest: the length, in the same unit, drawn at full saturation.
    """
    dx, dy = flow_HW2[..., 0], flow_HW2[..., 1]
    hue = np.mod(np.arctan2(dy, dx) / (2 * np.pi), 1.0)
    saturation = np.clip(np.hypot(dx, dy) / largest, 0.0, 1.0)
    colours = hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], axis=-1))
    return (colours * 255).round().astype(np.uint8)
