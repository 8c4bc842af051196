"""The demo's figures: body plans, and gaits as joint positions over time by forward kinematics.

Positions are in units of the figure's size, with y downwards and the figure facing right. Limb
directions are angles from straight down, positive forwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

# Legend: T instant, 2 x and y.

Kind = Literal["biped", "quadruped", "arm"]

Colour = tuple[int, int, int]
"""RGB, 0 to 255."""

PALETTE: dict[str, Colour] = {
    "head": (255, 255, 255),
    "torso": (255, 214, 0),
    "neck": (255, 170, 150),
    "tail": (140, 75, 20),
    "left_upper_arm": (20, 60, 255),
    "left_forearm": (60, 190, 255),
    "right_upper_arm": (215, 0, 25),
    "right_forearm": (255, 125, 0),
    "left_thigh": (0, 120, 40),
    "left_shin": (80, 240, 50),
    "left_foot": (0, 150, 150),
    "right_thigh": (120, 0, 190),
    "right_shin": (255, 50, 225),
    "right_foot": (120, 0, 80),
    "left_front_upper_leg": (20, 60, 255),
    "left_front_lower_leg": (60, 190, 255),
    "right_front_upper_leg": (215, 0, 25),
    "right_front_lower_leg": (255, 125, 0),
    "left_hind_upper_leg": (0, 120, 40),
    "left_hind_lower_leg": (80, 240, 50),
    "right_hind_upper_leg": (120, 0, 190),
    "right_hind_lower_leg": (255, 50, 225),
    "pedestal": (255, 255, 255),
    "lower_link": (20, 60, 255),
    "middle_link": (255, 125, 0),
    "upper_link": (80, 240, 50),
    "left_finger": (255, 50, 225),
    "right_finger": (215, 0, 25),
}
"""Colour of each limb by name. Colours are unique within a figure; corresponding limbs of different
figures, such as a front leg and an arm, share one."""


@dataclass(frozen=True, slots=True)
class Limb:
    """A capsule between two joints; lengths in units of the figure's size."""

    name: str
    start: str
    """Joint at the root of the limb."""
    end: str
    length: float
    radius: float

    @property
    def colour(self) -> Colour:
        """RGB colour from `PALETTE`."""
        return PALETTE[self.name]


@dataclass(frozen=True, slots=True)
class BodyPlan:
    """A kind of figure."""

    kind: Kind
    limbs: tuple[Limb, ...]
    """Back to front, for a figure that faces right."""

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Every joint once, in the order of the limbs."""
        return tuple(dict.fromkeys(j for limb in self.limbs for j in (limb.start, limb.end)))

    def length(self, name: str) -> float:
        """Length of a limb, in units of the figure's size.

        Raises:
            KeyError: The body plan has no such limb.
        """
        return {limb.name: limb.length for limb in self.limbs}[name]

    def drawing_order(self, *, faces_left: bool) -> tuple[Limb, ...]:
        """The limbs back to front; a figure that faces left shows its other side."""
        if not faces_left:
            return self.limbs
        return tuple(
            next(limb for limb in self.limbs if limb.name == _other_side(far.name))
            for far in self.limbs
        )


def _other_side(name: str) -> str:
    if name.startswith("left_"):
        return name.replace("left_", "right_", 1)
    return name.replace("right_", "left_", 1) if name.startswith("right_") else name


def _biped() -> BodyPlan:
    def arm(side: str) -> tuple[Limb, ...]:
        return (
            Limb(f"{side}_upper_arm", "shoulder", f"{side}_elbow", 0.17, 0.042),
            Limb(f"{side}_forearm", f"{side}_elbow", f"{side}_hand", 0.16, 0.038),
        )

    def leg(side: str) -> tuple[Limb, ...]:
        return (
            Limb(f"{side}_thigh", "hip", f"{side}_knee", 0.24, 0.056),
            Limb(f"{side}_foot", f"{side}_ankle", f"{side}_toe", 0.09, 0.034),
            Limb(f"{side}_shin", f"{side}_knee", f"{side}_ankle", 0.23, 0.046),
        )

    trunk = (
        Limb("torso", "hip", "shoulder", 0.29, 0.085),
        Limb("head", "neck", "crown", 0.05, 0.078),
    )
    return BodyPlan("biped", (*arm("left"), *leg("left"), *trunk, *leg("right"), *arm("right")))


def _quadruped() -> BodyPlan:
    def leg(side: str, end: str, root: str) -> tuple[Limb, ...]:
        name = f"{side}_{end}"
        return (
            Limb(f"{name}_upper_leg", root, f"{name}_knee", 0.20, 0.054),
            Limb(f"{name}_lower_leg", f"{name}_knee", f"{name}_foot", 0.21, 0.042),
        )

    def side(name: str) -> tuple[Limb, ...]:
        return (*leg(name, "hind", "hip"), *leg(name, "front", "shoulder"))

    trunk = (
        Limb("tail", "hip", "tail_tip", 0.22, 0.030),
        Limb("neck", "shoulder", "poll", 0.25, 0.058),
        Limb("torso", "hip", "shoulder", 0.46, 0.110),
        Limb("head", "poll", "muzzle", 0.12, 0.060),
    )
    return BodyPlan("quadruped", (*side("left"), *trunk, *side("right")))


def _arm() -> BodyPlan:
    return BodyPlan(
        "arm",
        (
            Limb("pedestal", "base", "swivel", 0.12, 0.095),
            Limb("left_finger", "wrist", "left_tip", 0.13, 0.032),
            Limb("lower_link", "swivel", "elbow", 0.34, 0.058),
            Limb("right_finger", "wrist", "right_tip", 0.13, 0.032),
            Limb("upper_link", "forearm_end", "wrist", 0.12, 0.042),
            Limb("middle_link", "elbow", "forearm_end", 0.28, 0.050),
        ),
    )


BODY_PLANS: dict[Kind, BodyPlan] = {
    "biped": _biped(),
    "quadruped": _quadruped(),
    "arm": _arm(),
}
"""Body plan of each kind of figure."""


Joints = dict[str, np.ndarray]
"""Joint name -> float64 [T, 2]."""


@dataclass(frozen=True, slots=True)
class Gait:
    """A periodic motion of one kind of figure."""

    name: str
    verb: str
    """Verb in the caption: "walks"."""
    kind: Kind
    pose: Callable[[BodyPlan, np.ndarray], Joints]
    """Joint positions, relative to the hip (or base), at phases [T] in radians."""
    travels: bool
    """Whether the figure moves over the ground."""
    cycles_per_second: tuple[float, float]
    """Minimum and maximum."""


def advance_per_cycle(gait: Gait) -> float:
    """Distance travelled per cycle, in figure sizes.

    It is how far the lowest foot moves backwards in the gait, so that feet hardly slide.
    """
    if not gait.travels:
        return 0.0
    phases = np.linspace(0.0, 2 * np.pi, 241)
    joints = gait.pose(BODY_PLANS[gait.kind], phases)
    feet = np.stack([joints[name] for name in _ground_joints(gait.kind)], axis=1)
    lowest = feet[:, :, 1].argmax(axis=1)
    moved = np.diff(feet[:, :, 0], axis=0)
    return float(-moved[np.arange(240), lowest[:-1]].sum())


def drop_to_ground(kind: Kind, joints: Joints) -> Joints:
    """Shift each instant vertically so that the lowest foot is at y = 0."""
    floor = np.max([joints[name][:, 1] for name in _ground_joints(kind)], axis=0)
    shift = np.stack([np.zeros_like(floor), -floor], axis=1)
    return {name: position + shift for name, position in joints.items()}


def _ground_joints(kind: Kind) -> tuple[str, ...]:
    if kind == "arm":
        return ("base",)
    ends = [f"{side}_{end}" for side in ("left", "right") for end in ("ankle", "toe")]
    paws = [f"{side}_{end}_foot" for side in ("left", "right") for end in ("front", "hind")]
    return tuple(ends if kind == "biped" else paws)


def _limb_end(start: np.ndarray, angle: np.ndarray | float, length: float) -> np.ndarray:
    direction = np.stack(np.broadcast_arrays(np.sin(angle), np.cos(angle)), axis=-1)
    return start + length * direction


def _knee_flexion(phase: np.ndarray, rest: float, swing: float) -> np.ndarray:
    """Knee angle: `rest` on the ground, up to `swing` more while the leg moves forward."""
    return rest + swing * ((1 + np.cos(phase)) / 2) ** 2


def _biped_pose(
    plan: BodyPlan, phase: np.ndarray, *, stride: float, knee: float, arm: float, lean: float
) -> Joints:
    hip = np.zeros((len(phase), 2))
    trunk_angle = np.pi - lean + 0.03 * np.sin(2 * phase)
    shoulder = _limb_end(hip, trunk_angle, plan.length("torso"))
    neck = _limb_end(shoulder, trunk_angle, 0.10)
    joints = {
        "hip": hip,
        "shoulder": shoulder,
        "neck": neck,
        "crown": _limb_end(neck, trunk_angle + 0.5 * lean, plan.length("head")),
    }
    for side, offset in (("right", 0.0), ("left", np.pi)):
        turn = phase + offset
        thigh = 0.1 * lean + stride * np.sin(turn)
        shin = thigh - _knee_flexion(turn, 0.08, knee)
        joints[f"{side}_knee"] = _limb_end(hip, thigh, plan.length(f"{side}_thigh"))
        ankle = _limb_end(joints[f"{side}_knee"], shin, plan.length(f"{side}_shin"))
        joints[f"{side}_ankle"] = ankle
        toe = np.pi / 2 + 0.6 * np.minimum(shin, 0.0) + 0.25 * np.maximum(shin, 0.0)
        joints[f"{side}_toe"] = _limb_end(ankle, toe, plan.length(f"{side}_foot"))
        upper = -arm * np.sin(turn) - 0.05
        fore = upper + 0.25 + 0.9 * arm * (1 - 0.5 * np.sin(turn))
        joints[f"{side}_elbow"] = _limb_end(shoulder, upper, plan.length(f"{side}_upper_arm"))
        joints[f"{side}_hand"] = _limb_end(
            joints[f"{side}_elbow"], fore, plan.length(f"{side}_forearm")
        )
    return joints


def _quadruped_pose(
    plan: BodyPlan,
    phase: np.ndarray,
    *,
    stride: float,
    knee: float,
    offsets: dict[str, float],
    nod: float,
) -> Joints:
    hip = np.zeros((len(phase), 2))
    shoulder = _limb_end(hip, np.pi / 2 + 0.06 + 0.03 * np.sin(2 * phase), plan.length("torso"))
    poll = _limb_end(shoulder, np.pi / 2 + 0.75 + nod * np.sin(phase), plan.length("neck"))
    joints = {
        "hip": hip,
        "shoulder": shoulder,
        "poll": poll,
        "muzzle": _limb_end(poll, np.pi / 2 - 0.45 + nod * np.sin(phase), plan.length("head")),
        "tail_tip": _limb_end(hip, -np.pi / 2 + 0.5 + 0.35 * np.sin(phase), plan.length("tail")),
    }
    for name, offset in offsets.items():
        turn = phase + 2 * np.pi * offset
        front = name.endswith("front")
        upper = stride * np.sin(turn) + (0.12 if front else -0.02)
        lower = upper - _knee_flexion(turn, 0.15, knee)
        root = shoulder if front else hip
        joints[f"{name}_knee"] = _limb_end(root, upper, plan.length(f"{name}_upper_leg"))
        joints[f"{name}_foot"] = _limb_end(
            joints[f"{name}_knee"], lower, plan.length(f"{name}_lower_leg")
        )
    return joints


def _arm_pose(
    plan: BodyPlan, phase: np.ndarray, *, sway: float, reach: float, wave: float
) -> Joints:
    base = np.zeros((len(phase), 2))
    swivel = _limb_end(base, np.pi, plan.length("pedestal"))
    lower = np.pi - 0.1 + sway * np.sin(phase)
    middle = lower - 1.0 + reach * np.sin(phase + 1.2)
    upper = middle - 0.5 + wave * np.sin(2 * phase + 0.6)
    grip = 0.35 + 0.25 * np.sin(2 * phase)
    elbow = _limb_end(swivel, lower, plan.length("lower_link"))
    forearm_end = _limb_end(elbow, middle, plan.length("middle_link"))
    wrist = _limb_end(forearm_end, upper, plan.length("upper_link"))
    return {
        "base": base,
        "swivel": swivel,
        "elbow": elbow,
        "forearm_end": forearm_end,
        "wrist": wrist,
        "left_tip": _limb_end(wrist, upper + grip, plan.length("left_finger")),
        "right_tip": _limb_end(wrist, upper - grip, plan.length("right_finger")),
    }


_WALK_OFFSETS = {"left_hind": 0.0, "left_front": 0.25, "right_hind": 0.5, "right_front": 0.75}
_TROT_OFFSETS = {"left_hind": 0.0, "right_front": 0.05, "right_hind": 0.5, "left_front": 0.55}

_walk = partial(_biped_pose, stride=0.42, knee=0.75, arm=0.4, lean=0.05)
_march = partial(_biped_pose, stride=0.55, knee=1.25, arm=0.75, lean=-0.02)
_run = partial(_biped_pose, stride=0.70, knee=1.5, arm=0.9, lean=0.22)
_pace = partial(_quadruped_pose, stride=0.38, knee=0.65, offsets=_WALK_OFFSETS, nod=0.08)
_trot = partial(_quadruped_pose, stride=0.5, knee=1.0, offsets=_TROT_OFFSETS, nod=0.05)
_swing = partial(_arm_pose, sway=0.6, reach=0.35, wave=0.2)
_reach = partial(_arm_pose, sway=0.3, reach=0.85, wave=0.3)
_wave = partial(_arm_pose, sway=0.15, reach=0.4, wave=0.9)

GAITS: tuple[Gait, ...] = (
    Gait("walk", "walks", "biped", _walk, True, (0.45, 0.8)),
    Gait("march", "marches", "biped", _march, True, (0.45, 0.7)),
    Gait("run", "runs", "biped", _run, True, (0.6, 0.95)),
    Gait("walk", "walks", "quadruped", _pace, True, (0.45, 0.75)),
    Gait("trot", "trots", "quadruped", _trot, True, (0.55, 0.9)),
    Gait("swing", "swings", "arm", _swing, False, (0.25, 0.45)),
    Gait("reach", "reaches out", "arm", _reach, False, (0.25, 0.45)),
    Gait("wave", "waves", "arm", _wave, False, (0.25, 0.4)),
)
"""All gaits; each kind of figure has two or three."""
