"""Draws the demo's clips: a moving figure before a background, with ground truth.

Each clip is a function of its seed and size; joints and limb visibility are returned with it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.demo.backgrounds import POST_PROBABILITY, Background, make_background
from stages.demo.figures import (
    BODY_PLANS,
    GAITS,
    Gait,
    Kind,
    Limb,
    advance_per_cycle,
    drop_to_ground,
)

# Legend: T frame, H W pixels, C colour (RGB), J joint, L limb, 2 x and y.

_KINDS: tuple[Kind, ...] = ("biped", "quadruped", "arm")
_SIZES: dict[Kind, tuple[float, float]] = {
    "biped": (0.68, 0.80),
    "quadruped": (0.70, 0.86),
    "arm": (0.72, 0.88),
}
"""Minimum and maximum size of a figure, in frame heights."""
_SHADING = 0.3
"""By how much a limb's edge is darker than its axis."""
_CAPTION_SUBJECTS: dict[Kind, str] = {
    "biped": "A biped with blue and red arms, green and purple legs",
    "quadruped": "A quadruped with blue, red, green and purple legs",
    "arm": "A robot arm with blue, orange and green links",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FigureClip:
    """A drawn clip and its ground truth; coordinates in pixels of the frame."""

    frames_THWC: np.ndarray
    """uint8 [T, H, W, 3]."""
    fps: float
    caption: str
    masks_THW: np.ndarray
    """bool [T, H, W]: visible pixels of the figure."""
    kind: Kind
    gait: str
    joint_names: tuple[str, ...]
    joints_TJ2: np.ndarray
    """float64 [T, J, 2]; joints may be occluded or outside the frame."""
    limbs: tuple[Limb, ...]
    """Limbs of the body plan; lengths and radii in units of `size`."""
    size: float
    """Pixels per unit of the body plan."""
    visible_TL: np.ndarray
    """float64 [T, L]: fraction of each limb's area not hidden by other limbs, the occluder or the
    frame edge."""
    scenery_THWC: np.ndarray
    """uint8 [T, H, W, 3]: the frames without the figure and its shadow."""

    @property
    def mask_HW(self) -> np.ndarray:
        """bool [H, W]: visible pixels of the figure on frame 0."""
        return self.masks_THW[0]

    def ground_truth(self) -> dict[str, Any]:
        """Joints and limbs as JSON values."""
        return {
            "kind": self.kind,
            "gait": self.gait,
            "fps": self.fps,
            "height": self.frames_THWC.shape[1],
            "width": self.frames_THWC.shape[2],
            "joint_names": list(self.joint_names),
            "joints_xy": np.round(self.joints_TJ2, 3).tolist(),
            "limbs": [
                {
                    "name": limb.name,
                    "joints": [limb.start, limb.end],
                    "length_px": round(limb.length * self.size, 3),
                    "radius_px": round(limb.radius * self.size, 3),
                    "colour_rgb": list(limb.colour),
                }
                for limb in self.limbs
            ],
            "visible": np.round(self.visible_TL, 3).tolist(),
        }


def draw_clip(
    seed: int,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float = 8.0,
    post_probability: float = POST_PROBABILITY,
) -> FigureClip:
    """Draw one clip; the same arguments give the same bytes.

    The kind of figure cycles with the seed (biped, quadruped, arm). Gait, size, speed, direction,
    background, camera pan and the post are sampled with the seed.

    Args:
        seed: A non-negative integer.
        num_frames: Number of frames.
        height: Frame height, pixels.
        width: Frame width, pixels.
        fps: Frames per second; the motion per second does not depend on it.
        post_probability: Probability of a post in front of the figure.
    """
    random = np.random.default_rng(seed)
    kind = _KINDS[seed % len(_KINDS)]
    choices = [gait for gait in GAITS if gait.kind == kind]
    gait = choices[int(random.integers(len(choices)))]
    plan = BODY_PLANS[kind]
    size = height * random.uniform(*_SIZES[kind])
    faces_left = bool(random.random() < 0.5)
    pans = bool(random.random() < 0.5)
    path = _path(
        random, gait, size=size, width=width, seconds=num_frames / fps, pans=pans, left=faces_left
    )

    time_T = np.arange(num_frames) / fps
    progress_T = time_T * fps / num_frames
    phase_T = random.uniform(0, 2 * np.pi) + 2 * np.pi * path.cycles_per_second * time_T
    joints = drop_to_ground(kind, gait.pose(plan, phase_T))
    joints_TJ2 = np.stack([joints[name] for name in plan.joint_names], axis=1) * size
    joints_TJ2[..., 0] -= joints_TJ2[..., 0].mean()
    if faces_left:
        joints_TJ2[..., 0] *= -1
    on_screen_T = (0.5 + random.uniform(-0.05, 0.05)) * width + path.screen * (progress_T - 0.5)
    joints_TJ2[..., 0] += on_screen_T[:, None]

    background = make_background(
        random,
        height=height,
        width=width,
        camera_T=(path.ground - path.screen) * progress_T,
        subject_T=on_screen_T,
        post_probability=post_probability,
    )
    joints_TJ2[..., 1] += background.ground_y
    order = plan.drawing_order(faces_left=faces_left)
    painted = [
        _paint(background, frame, order, dict(zip(plan.joint_names, joints_J2, strict=True)), size)
        for frame, joints_J2 in enumerate(joints_TJ2)
    ]
    labels_THW = np.stack([labels_HW for _, labels_HW, _ in painted])
    visible = [[visible.get(limb.name, 0.0) for limb in plan.limbs] for _, _, visible in painted]
    return FigureClip(
        frames_THWC=np.stack([image_HWC for image_HWC, _, _ in painted]),
        fps=fps,
        caption=_caption(gait, background, faces_left=faces_left, pans=pans),
        masks_THW=labels_THW >= 0,
        kind=kind,
        gait=gait.name,
        joint_names=plan.joint_names,
        joints_TJ2=joints_TJ2,
        limbs=plan.limbs,
        size=size,
        visible_TL=np.array(visible),
        scenery_THWC=np.stack([_scenery(background, frame) for frame in range(num_frames)]),
    )


@dataclass(frozen=True, slots=True)
class _Path:
    """Distances travelled in the clip, in pixels to the right, and the speed of the gait."""

    ground: float
    """Distance of the figure over the ground."""
    screen: float
    """Distance of the figure on screen; the camera moves by the difference."""
    cycles_per_second: float


def _path(
    random: np.random.Generator,
    gait: Gait,
    *,
    size: float,
    width: int,
    seconds: float,
    pans: bool,
    left: bool,
) -> _Path:
    slowest, fastest = gait.cycles_per_second
    cycles = random.uniform(slowest, fastest)
    screen_distance = width * (random.uniform(0.1, 0.3) if pans else random.uniform(0.35, 0.55))
    if not gait.travels:
        drift = screen_distance * random.choice((-1.0, 1.0)) if pans else 0.0
        return _Path(0.0, drift, cycles)
    pixels_per_cycle = advance_per_cycle(gait) * size
    if not pans:
        # Choose the speed by the distance; if the figure is still too fast, the camera follows.
        cycles = float(
            np.clip(screen_distance / (pixels_per_cycle * seconds), 0.6 * slowest, fastest)
        )
    ground = pixels_per_cycle * cycles * seconds
    sign = -1.0 if left else 1.0
    return _Path(sign * ground, sign * min(ground, screen_distance), cycles)


def _paint(
    background: Background,
    frame: int,
    limbs: tuple[Limb, ...],
    joints: dict[str, np.ndarray],
    size: float,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Draw a frame: uint8 image, index of the limb at each pixel (-1: none), visible fractions."""
    canvas_HWC = background.draw_backdrop(frame)
    height, width, _ = canvas_HWC.shape
    background.cast_shadow(canvas_HWC, np.stack(list(joints.values())), size)
    labels_HW = np.full((height, width), -1)
    limb_areas: dict[str, float] = {}
    for index, limb in enumerate(limbs):
        radius = limb.radius * size
        window, coverage_HW, distance_HW = capsule_coverage(
            joints[limb.start], joints[limb.end], radius, height=height, width=width
        )
        shade_HW = 1 - _SHADING * np.minimum(distance_HW, 1.0) ** 2
        colour_HWC = shade_HW[..., None] * (np.array(limb.colour) / 255)
        canvas_HWC[window] += coverage_HW[..., None] * (colour_HWC - canvas_HWC[window])
        labels_HW[window][coverage_HW > 0.5] = index
        limb_areas[limb.name] = _capsule_area(limb, size)
    labels_HW[background.draw_post(canvas_HWC, frame) > 0.5] = -1
    visible = {
        limb.name: min(1.0, float((labels_HW == index).sum() / limb_areas[limb.name]))
        for index, limb in enumerate(limbs)
    }
    return _as_image(canvas_HWC), labels_HW, visible


def _scenery(background: Background, frame: int) -> np.ndarray:
    canvas_HWC = background.draw_backdrop(frame)
    background.draw_post(canvas_HWC, frame)
    return _as_image(canvas_HWC)


def _as_image(canvas_HWC: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(canvas_HWC * 255), 0, 255).astype(np.uint8)


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


def _capsule_area(limb: Limb, size: float) -> float:
    radius, length = limb.radius * size, limb.length * size
    return np.pi * radius**2 + 2 * radius * length


def _caption(gait: Gait, background: Background, *, faces_left: bool, pans: bool) -> str:
    side = "left" if faces_left else "right"
    action = f"{gait.verb} to the {side}" if gait.travels else f"{gait.verb}, facing {side},"
    ending = " while the camera pans" if pans else ""
    ending += ", behind a post" if background.has_post else ""
    return f"{_CAPTION_SUBJECTS[gait.kind]} {action} {background.words}{ending}."
