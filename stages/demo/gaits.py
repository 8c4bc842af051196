"""Gaits of the demo's figures: joint positions over time by forward kinematics.

Positions are in units of the figure's size, with y downwards and the figure facing right. Limb
directions are angles from straight down, positive forwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stages.demo.bodies import BODY_PLANS, BodyPlan, Kind

# Legend: T instant, 2 x and y.

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


def _walk(plan: BodyPlan, phase: np.ndarray) -> Joints:
    return _biped_pose(plan, phase, stride=0.42, knee=0.75, arm=0.4, lean=0.05)


def _march(plan: BodyPlan, phase: np.ndarray) -> Joints:
    return _biped_pose(plan, phase, stride=0.55, knee=1.25, arm=0.75, lean=-0.02)


def _run(plan: BodyPlan, phase: np.ndarray) -> Joints:
    return _biped_pose(plan, phase, stride=0.70, knee=1.5, arm=0.9, lean=0.22)


def _pace(plan: BodyPlan, phase: np.ndarray) -> Joints:
    return _quadruped_pose(plan, phase, stride=0.38, knee=0.65, offsets=_WALK_OFFSETS, nod=0.08)


def _trot(plan: BodyPlan, phase: np.ndarray) -> Joints:
    return _quadruped_pose(plan, phase, stride=0.5, knee=1.0, offsets=_TROT_OFFSETS, nod=0.05)


def _swing(plan: BodyPlan, phase: np.ndarray) -> Joints:
    return _arm_pose(plan, phase, sway=0.6, reach=0.35, wave=0.2)


def _reach(plan: BodyPlan, phase: np.ndarray) -> Joints:
    return _arm_pose(plan, phase, sway=0.3, reach=0.85, wave=0.3)


def _wave(plan: BodyPlan, phase: np.ndarray) -> Joints:
    return _arm_pose(plan, phase, sway=0.15, reach=0.4, wave=0.9)


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
