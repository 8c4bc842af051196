"""Scenery of a demo clip: a textured wall and floor, and sometimes a post in front."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

# Legend: T frame, H W pixels, C colour (RGB, 0 to 1), J joint, 2 x and y.

# Muted colours, unlike those of any limb.
FLOORS = {
    "sand": (0.60, 0.53, 0.42),
    "grass": (0.36, 0.43, 0.33),
    "stone": (0.47, 0.47, 0.48),
    "earth": (0.43, 0.36, 0.31),
}
WALLS = {
    "slate": (0.33, 0.36, 0.41),
    "brick": (0.47, 0.38, 0.36),
    "plaster": (0.62, 0.60, 0.57),
    "moss": (0.30, 0.34, 0.29),
}
_WALL_PARALLAX = 0.6
"""Fraction of the camera's pan by which the distant wall moves."""
_CONTRAST = 0.16
POST_COLOUR = np.array([0.12, 0.12, 0.13])
POST_PROBABILITY = 0.3
"""Usual fraction of clips with a post."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Background:
    """Textures and camera positions of one clip."""

    ground_y: float
    """Distance from the top of the frame to the ground, pixels."""
    words: str
    """Caption fragment: "over sand, by a slate wall"."""
    _wall_HWC: np.ndarray
    _floor_HWC: np.ndarray
    _camera_T: np.ndarray
    """Camera position in pixels to the right, never negative."""
    _width: int
    _horizon: int
    _post_left: float | None
    _post_width: float

    @property
    def has_post(self) -> bool:
        """Whether a post stands between camera and figure."""
        return self._post_left is not None

    def draw_backdrop(self, frame: int) -> np.ndarray:
        """Draw wall and floor of a frame: a new float64 [H, W, 3] array."""
        camera = float(self._camera_T[frame])
        canvas_HWC = scrolled(self._wall_HWC, camera * _WALL_PARALLAX, self._width)
        canvas_HWC[self._horizon :] = scrolled(self._floor_HWC, camera, self._width)
        return canvas_HWC

    def cast_shadow(self, canvas_HWC: np.ndarray, joints_J2: np.ndarray, size: float) -> None:
        """Darken the floor under the figure, in place."""
        height, width, _ = canvas_HWC.shape
        low, high = joints_J2[:, 0].min(), joints_J2[:, 0].max()
        x_1W = (np.arange(width)[None, :] + 0.5 - (low + high) / 2) / (0.55 * (high - low) + 1)
        y_H1 = (np.arange(height)[:, None] + 0.5 - self.ground_y - 0.02 * size) / (0.06 * size)
        canvas_HWC *= (1 - 0.45 * np.exp(-((x_1W**2 + y_H1**2) ** 2)))[..., None]

    def draw_post(self, canvas_HWC: np.ndarray, frame: int) -> np.ndarray:
        """Draw the post over the canvas, in place; returns its coverage [H, W] in 0..1."""
        height, width, _ = canvas_HWC.shape
        if self._post_left is None:
            return np.zeros((height, width))
        left = self._post_left - float(self._camera_T[frame])
        edges_W = np.arange(width)
        covered_W = np.clip(
            np.minimum(edges_W + 1, left + self._post_width) - np.maximum(edges_W, left), 0, 1
        )
        across_W = (edges_W + 0.5 - left) / self._post_width
        colour_WC = POST_COLOUR * (1.3 - 0.6 * np.abs(across_W - 0.4))[:, None]
        canvas_HWC += covered_W[None, :, None] * (colour_WC - canvas_HWC)
        return np.broadcast_to(covered_W, (height, width))


def make_background(
    random: np.random.Generator,
    *,
    height: int,
    width: int,
    camera_T: np.ndarray,
    subject_T: np.ndarray,
    post_probability: float = POST_PROBABILITY,
) -> Background:
    """Draw the textures of a clip.

    Args:
        random: Random generator.
        height: Frame height, pixels.
        width: Frame width, pixels.
        camera_T: Camera position, pixels to the right of any fixed point.
        subject_T: Subject position on screen, pixels; a post is placed on its path.
        post_probability: Probability of a post.
    """
    camera_T = camera_T - camera_T.min()
    horizon = round(height * random.uniform(0.62, 0.70))
    ground_y = height * random.uniform(0.84, 0.89)
    floor = list(FLOORS)[int(random.integers(len(FLOORS)))]
    wall = list(WALLS)[int(random.integers(len(WALLS)))]
    texture_width = width + int(np.ceil(camera_T.max())) + 2
    wall_HWC = _texture(random, WALLS[wall], height, texture_width, cell=height / 6)
    floor_HWC = _texture(random, FLOORS[floor], height - horizon, texture_width, cell=height / 9)
    post_width = width * random.uniform(0.05, 0.08)
    post_frame = int(len(camera_T) * random.uniform(0.35, 0.65))
    # In world coordinates, so that figure and camera move past it.
    post_left = camera_T[post_frame] + subject_T[post_frame] - post_width / 2
    return Background(
        ground_y=ground_y,
        words=f"over {floor}, by a {wall} wall",
        _wall_HWC=wall_HWC,
        _floor_HWC=floor_HWC,
        _camera_T=camera_T,
        _width=width,
        _horizon=horizon,
        _post_left=float(post_left) if random.random() < post_probability else None,
        _post_width=post_width,
    )


def _texture(
    random: np.random.Generator,
    colour: tuple[float, float, float],
    height: int,
    width: int,
    *,
    cell: float,
) -> np.ndarray:
    light_HW = 1 + _CONTRAST * 2 * smooth_noise(random, height, width, cell=cell)
    tint_HW = 0.04 * smooth_noise(random, height, width, cell=2 * cell)
    texture_HWC = light_HW[..., None] * np.array(colour)
    texture_HWC[..., 0] += tint_HW
    texture_HWC[..., 2] -= tint_HW
    return np.clip(texture_HWC, 0.0, 1.0)


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
