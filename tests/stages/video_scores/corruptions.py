"""Draws figures of the demo with known faults, to test that scores of figures find them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from stages.demo.backgrounds import Background, make_background
from stages.demo.figures import BODY_PLANS, Kind, Limb
from stages.demo.scenes import _paint, draw_clip

# Legend: T frame, H W pixels, C colour (RGB), L limb, 2 x and y.

FPS = 8.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Figure:
    """A figure in motion before its background, not yet drawn."""

    kind: Kind
    size: float
    limbs: tuple[Limb, ...]
    """Back to front."""
    joints: dict[str, np.ndarray]
    """Joint name -> float64 [T, 2], pixels."""
    background: Background
    height: int
    width: int

    @property
    def num_frames(self) -> int:
        return len(next(iter(self.joints.values())))

    def draw(self) -> np.ndarray:
        """Frames, uint8 [T, H, W, 3]."""
        return np.stack([image_HWC for image_HWC, _ in self._painted()])

    def labels(self) -> np.ndarray:
        """Index into `limbs` of the limb at each pixel, -1 for none: int [T, H, W]."""
        return np.stack([labels_HW for _, labels_HW in self._painted()])

    def _painted(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            _paint(
                self.background,
                frame,
                self.limbs,
                {name: position_T2[frame] for name, position_T2 in self.joints.items()},
                self.size,
            )[:2]
            for frame in range(self.num_frames)
        ]


def figure(
    seed: int, *, num_frames: int = 17, height: int = 64, width: int = 96, scale: float = 1.0
) -> Figure:
    """The figure of `draw_clip(seed)` with its motion and a background of its own.

    `scale` enlarges the figure about the ground at the middle of the frame.
    """
    clip = draw_clip(seed, num_frames=num_frames, height=height, width=width, fps=FPS)
    pan_T = np.linspace(0.0, width * (seed % 2) * 0.3, num_frames)
    background = make_background(
        np.random.default_rng(seed),
        height=height,
        width=width,
        camera_T=pan_T,
        subject_T=clip.joints_TJ2[..., 0].mean(axis=1),
    )
    ground = {"biped": ("left_ankle", "right_ankle", "left_toe", "right_toe"), "arm": ("base",)}
    feet = ground.get(clip.kind, tuple(name for name in clip.joint_names if "foot" in name))
    joints = dict(zip(clip.joint_names, clip.joints_TJ2.swapaxes(0, 1), strict=True))
    before_2 = np.array([width / 2, np.max([joints[name][..., 1] for name in feet])])
    after_2 = np.array([width / 2, background.ground_y])
    return Figure(
        kind=clip.kind,
        size=scale * clip.size,
        limbs=BODY_PLANS[clip.kind].drawing_order(faces_left=" left" in clip.caption),
        joints={name: scale * (at_T2 - before_2) + after_2 for name, at_T2 in joints.items()},
        background=background,
        height=height,
        width=width,
    )


def without(fig: Figure, *names: str) -> Figure:
    """Remove limbs."""
    kept = tuple(limb for limb in fig.limbs if limb.name not in names)
    assert len(kept) == len(fig.limbs) - len(names)
    return replace(fig, limbs=kept)


def stretched(fig: Figure, factor: float, *names: str) -> Figure:
    """Lengthen limbs; what hangs from them moves along."""
    for limb in (limb for limb in fig.limbs if limb.name in names):
        span_T2 = fig.joints[limb.end] - fig.joints[limb.start]
        fig = _moved(fig, limb.end, (factor - 1) * span_T2)
    return fig


def detached(fig: Figure, gap: float, *names: str) -> Figure:
    """Move limbs, and what hangs from them, away along their axis until the gap is visible.

    Args:
        fig: The figure.
        gap: Distance between the caps around the joint, in figure sizes.
        names: Limbs.
    """
    for limb in (limb for limb in fig.limbs if limb.name in names):
        parents = [other for other in fig.limbs if limb.start in (other.start, other.end)]
        radius = max(other.radius for other in parents if other.name not in names)
        span_T2 = fig.joints[limb.end] - fig.joints[limb.start]
        shift_T2 = (gap + radius + limb.radius) / limb.length * span_T2
        start = f"detached_{limb.name}"
        joints = fig.joints | {start: fig.joints[limb.start] + shift_T2}
        fig = _moved(replace(fig, joints=joints), limb.end, shift_T2)
        limbs = tuple(
            replace(other, start=start) if other.name == limb.name else other for other in fig.limbs
        )
        fig = replace(fig, limbs=limbs)
    return fig


def _moved(fig: Figure, joint: str, shift_T2: np.ndarray) -> Figure:
    """Shift a joint and every joint that hangs from it."""
    moved = [joint]
    for name in moved:
        moved.extend(limb.end for limb in fig.limbs if limb.start == name)
    joints = {
        name: position_T2 + shift_T2 if name in moved else position_T2
        for name, position_T2 in fig.joints.items()
    }
    return replace(fig, joints=joints)


def swapped_sides(fig: Figure, *frames: int) -> Figure:
    """Exchange the left and right limbs at each of the frames, for the frames from there on."""
    times_T = np.arange(fig.num_frames)
    swapped_T1 = (sum((times_T >= frame for frame in frames), 0 * times_T) % 2 == 1)[:, None]
    return replace(
        fig,
        joints={
            name: np.where(swapped_T1, fig.joints[_mirrored(name)], position_T2)
            for name, position_T2 in fig.joints.items()
        },
    )


def _mirrored(name: str) -> str:
    side, _, rest = name.partition("_")
    other = {"left": "right", "right": "left"}
    return f"{other[side]}_{rest}" if side in other else name


def doubled(fig: Figure, *chains: Sequence[str]) -> Figure:
    """Draw chains of limbs, such as a thigh and its shin, a second time, pointing elsewhere."""
    limbs, joints = list(fig.limbs), dict(fig.joints)
    for chain in chains:
        first = next(limb for limb in fig.limbs if limb.name == chain[0])
        pivot_T2 = fig.joints[first.start]
        for name in chain:
            limb = next(limb for limb in fig.limbs if limb.name == name)
            for joint in (limb.start, limb.end):
                x_T, y_T = (fig.joints[joint] - pivot_T2).T
                # Turned by a right angle, so that both can be seen.
                joints[f"second_{joint}"] = pivot_T2 + np.stack([y_T, -x_T], axis=1)
            second = replace(limb, start=f"second_{limb.start}", end=f"second_{limb.end}")
            limbs.insert(0, second)
    return replace(fig, limbs=tuple(limbs), joints=joints)


def frozen(fig: Figure) -> Figure:
    """Repeat the first pose before the moving background."""
    joints = {name: np.repeat(at_T2[:1], len(at_T2), axis=0) for name, at_T2 in fig.joints.items()}
    return replace(fig, joints=joints)


def blurred(frames_THWC: np.ndarray, sigma: float) -> np.ndarray:
    """Blur each frame; `sigma` in pixels."""
    blur = ImageFilter.GaussianBlur(sigma)
    return np.stack([np.asarray(Image.fromarray(frame).filter(blur)) for frame in frames_THWC])
