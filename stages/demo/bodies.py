"""Body plans of the demo's figures: joints, limbs, proportions and colours."""

from dataclasses import dataclass
from typing import Literal

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
