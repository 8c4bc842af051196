"""Labels the pixels of a video of the demo's figures by the colour of their limb."""

from functools import cache

import numpy as np

from stages.demo.backgrounds import FLOORS, POST_COLOUR, WALLS
from stages.demo.figures import BodyPlan

# Legend: T frame, H W pixels, C colour (RGB), K label, N pixel.

BACKGROUND, POST, OUTSIDE = -1, -2, -3
"""Labels other than the index of a limb in the body plan; `OUTSIDE` of the frame."""
_UNKNOWN = -4
_SCENERY = (*FLOORS.values(), *WALLS.values())
_LIMB_LIGHT, _SCENERY_LIGHT, _POST_LIGHT = (0.68, 1.05), (0.45, 1.25), (0.4, 1.6)
"""Range of the factor by which shading, texture and shadow multiply a colour."""
_WHITE_LIGHT = (0.78, 1.05)
"""For white limbs, whose dark edges look like a bright wall."""
_MAX_COLOUR_ERROR = 60.0
"""Euclidean distance in RGB (0 to 255) beyond which a pixel is a blend of its neighbours."""
_MIN_POST = 0.4
"""Fraction of a column from which its dark pixels are a post."""


def label_limbs(frames_THWC: np.ndarray, plan: BodyPlan) -> np.ndarray:
    """Index of the limb in `plan.limbs` at each pixel, negative for none: int8 [T, H, W]."""
    colours_THWC = frames_THWC.astype(np.int16)
    red, green, blue = np.moveaxis(colours_THWC >> 3, -1, 0)
    labels_THW = _label_table(plan)[red, green, blue]
    unknown_THW = (labels_THW == _UNKNOWN) | _blends(colours_THWC, labels_THW)
    labels_THW[unknown_THW] = _UNKNOWN
    labels_THW = _label_like_neighbours(colours_THWC, labels_THW)
    # The post covers whole columns; dark specks elsewhere are scenery.
    posts_T1W = (labels_THW == POST).mean(axis=1, keepdims=True) > _MIN_POST
    posts_T1W |= _shifted(posts_T1W, 0, 1) | _shifted(posts_T1W, 0, -1)
    labels_THW[labels_THW < 0] = BACKGROUND
    labels_THW[(labels_THW < 0) & posts_T1W] = POST
    return labels_THW


@cache
def _label_table(plan: BodyPlan) -> np.ndarray:
    """Label of each colour of 5 bits per channel: the nearest colour times a factor."""
    limbs = [limb.colour for limb in plan.limbs]
    scenery = [tuple(255 * np.array(colour)) for colour in (*_SCENERY, POST_COLOUR)]
    colours_KC = np.array([*limbs, *scenery])
    light_K2 = np.array(
        [_LIMB_LIGHT if np.ptp(colour) else _WHITE_LIGHT for colour in limbs]
        + [_SCENERY_LIGHT] * len(_SCENERY)
        + [_POST_LIGHT]
    )
    labels_K = np.array([*range(len(limbs)), *([BACKGROUND] * len(_SCENERY)), POST])
    levels = np.arange(32) * 8.0 + 4
    pixels_NC = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    light_NK = np.clip(pixels_NC @ colours_KC.T / (colours_KC**2).sum(1), *light_K2.T)
    errors_NK = np.linalg.norm(pixels_NC[:, None] - light_NK[..., None] * colours_KC, axis=-1)
    labels_N = labels_K[errors_NK.argmin(1)]
    labels_N[errors_NK.min(1) > _MAX_COLOUR_ERROR] = _UNKNOWN
    return labels_N.reshape(32, 32, 32).astype(np.int8)


def _blends(colours_THWC: np.ndarray, labels_THW: np.ndarray) -> np.ndarray:
    """Pixels on an edge between two other labels, whose mixture looks like a third: bool."""
    height, width = labels_THW.shape[1:]
    blends_THW = np.zeros(labels_THW.shape, dtype=bool)
    # Chroma of half resolution smears over two pixels.
    for dy, dx in ((s * y, s * x) for s in (1, 2) for y, x in ((0, 1), (1, 0), (1, 1), (1, -1))):
        sides = [_shifted(labels_THW, s * dy, s * dx) != labels_THW for s in (1, -1)]
        t, y, x = np.nonzero((labels_THW >= 0) & sides[0] & sides[1])
        start_NC, end_NC = (
            colours_THWC[t, np.clip(y + s * dy, 0, height - 1), np.clip(x + s * dx, 0, width - 1)]
            for s in (1, -1)
        )
        axis_NC, offset_NC = (end_NC - start_NC).astype(float), colours_THWC[t, y, x] - start_NC
        length_N = np.maximum(np.linalg.norm(axis_NC, axis=1), 1e-9)
        part_N = (offset_NC * axis_NC).sum(1) / length_N**2
        error_N = np.linalg.norm(offset_NC - part_N[:, None] * axis_NC, axis=1)
        mixed_N = (length_N > 80) & (error_N < 40) & (part_N > 0.1) & (part_N < 0.9)
        blends_THW[t[mixed_N], y[mixed_N], x[mixed_N]] = True
    return blends_THW


def _label_like_neighbours(colours_THWC: np.ndarray, labels_THW: np.ndarray) -> np.ndarray:
    """Give each unknown pixel the label of the known one of most similar colour around it."""
    height, width = labels_THW.shape[1:]
    t, y, x = np.nonzero(labels_THW == _UNKNOWN)
    best_N = np.full(len(t), np.inf)
    found_N = np.full(len(t), BACKGROUND, dtype=np.int8)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near = t, np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)
            error_N = np.linalg.norm(colours_THWC[near] - colours_THWC[t, y, x], axis=1)
            better_N = (labels_THW[near] != _UNKNOWN) & (error_N < best_N)
            best_N[better_N] = error_N[better_N]
            found_N[better_N] = labels_THW[near][better_N]
    labels_THW = labels_THW.copy()
    labels_THW[t, y, x] = found_N
    return labels_THW


def _shifted(values_THW: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """`out[t, y, x] = values[t, y + dy, x + dx]`, repeating the edge."""
    height, width = values_THW.shape[1:]
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    return values_THW[:, rows[:, None], columns]


def connected_pieces(labels_THW: np.ndarray) -> np.ndarray:
    """Number the 8-connected pieces of equal label within each frame: int64 [T, H, W].

    A piece's number is the flat index of its first pixel; negative labels have -1.
    """
    _, height, width = labels_THW.shape
    flat_THW = np.arange(labels_THW.size).reshape(labels_THW.shape)
    links = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one = np.s_[:, : height - dy, max(-dx, 0) : width - max(dx, 0)]
        other = np.s_[:, dy:, max(dx, 0) : width + min(dx, 0)]
        same = (labels_THW[one] == labels_THW[other]) & (labels_THW[one] >= 0)
        links.append(np.stack([flat_THW[one][same], flat_THW[other][same]]))
    one_N, other_N = np.concatenate(links, axis=1)
    root_N = flat_THW.ravel().copy()
    while (root_N[one_N] != root_N[other_N]).any():
        low_N = np.minimum(root_N[one_N], root_N[other_N])
        np.minimum.at(root_N, root_N[one_N], low_N)
        np.minimum.at(root_N, root_N[other_N], low_N)
        root_N = root_N[root_N]
    return np.where(labels_THW >= 0, root_N.reshape(labels_THW.shape), -1)
