"""The arms of the comparison: what each changes in config.yaml."""

from dataclasses import dataclass
from typing import Literal

Group = Literal["main", "control", "projector", "open", "full", "scratch"]
"""main: the paper's claim; control: other teachers; projector: how much of the loss the projector
meets without the transformer; open: settings that the paper leaves open, each changed alone; full:
all weights of the base model, more steps and clips; scratch: training from random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train."""

    name: str
    group: Group
    about: str
    """What it is, for the table."""
    train: tuple[str, ...]
    """Settings of stage two."""
    teacher: tuple[str, ...] = ()
    """Settings of stage one."""
    tracker: Literal["tiny", "random"] = "tiny"
    """The packaged tracker, or one with random weights."""
    limbs: bool = False
    """The teacher is the drawing itself (`limb_features.py`), not the tracker."""
    weight: str | None = None
    """Key of the auxiliary loss's weight; None if there is none."""
    weight_of: str | None = None
    """Arm whose tuned weight it takes; None tunes its own."""


NONE = "none"
LGF = "lgf"


def _lgf(name: str, group: Group, about: str, *train: str, **others: object) -> Arm:
    return Arm(
        name=name,
        group=group,
        about=about,
        train=("train.objectives=[lgf]", *train),
        weight="train.lgf.weight",
        **others,  # type: ignore[arg-type]
    )


def _open(name: str, about: str, *train: str, teacher: tuple[str, ...] = ()) -> Arm:
    """LGF with one setting changed, at the weight chosen for LGF."""
    return _lgf(name, "open", about, *train, teacher=teacher, weight_of=LGF)


_NARROW = "train.lgf.projector_widths=[8,8,8]"


def _projector(name: str, about: str, weight: float, *train: str, **others: object) -> Arm:
    """LGF at a weight that is not tuned.

    At 0.001 the projector learns, since Adam scales its gradients, but the transformer hardly does.
    """
    train = ("train.objectives=[lgf]", f"train.lgf.weight={weight:g}", *train)
    return Arm(name=name, group="projector", about=about, train=train, **others)  # type: ignore[arg-type]


_LATENT = ("extract.teacher.time_rate=latent",)
_FULL = ("train.optimizer.learning_rate=5.0e-4", "train.optimizer.schedule=cosine")
_PAPER_WEIGHT = "train.lgf.weight=0.5"


def _full(name: str, about: str, *train: str, **others: object) -> Arm:
    """All weights are trained; the loss has the paper's weight, for tuning would cost too much."""
    train = (*_FULL, *train)
    return Arm(name=name, group="full", about=about, train=train, **others)  # type: ignore[arg-type]


ARMS = (
    Arm(name=NONE, group="main", about="diffusion loss only", train=("train.objectives=none",)),
    Arm(
        name="mask",
        group="main",
        about="mask supervision",
        train=("train.objectives=[mask]",),
        weight="train.mask.weight",
    ),
    Arm(
        name="repa",
        group="main",
        about="REPA, one feature map per frame",
        train=("train.objectives=[repa]",),
        weight="train.repa.weight",
    ),
    Arm(
        name="repa-latent",
        group="main",
        about="REPA, features averaged over each latent's frames",
        train=("train.objectives=[repa]",),
        teacher=_LATENT,
        weight="train.repa.weight",
    ),
    Arm(
        name="token-relation",
        group="main",
        about="token relations, all tokens",
        train=("train.objectives=[token-relation]",),
        weight="train.token_relation.weight",
    ),
    Arm(
        name="token-relation-pooled",
        group="main",
        about="token relations nearest to VideoREPA: a learned downsampler, without latent 0",
        train=(
            "train.objectives=[token-relation]",
            "train.token_relation.downsampler=learned",
            "train.token_relation.skip_first_latent=true",
            "train.token_relation.pool=2",
        ),
        weight="train.token_relation.weight",
    ),
    _lgf(
        "lgf-forward",
        "main",
        "Local Gram Flow of the forward track only",
        "train.lgf.directions=forward",
    ),
    _lgf(
        "lgf-averaged",
        "main",
        "Local Gram Flow of averaged features",
        "train.lgf.directions=averaged",
    ),
    _lgf("lgf-l2", "main", "Local Gram Flow, squared error", "train.lgf.divergence=l2"),
    _lgf(LGF, "main", "Local Gram Flow, fused, KL"),
    _lgf(
        "lgf-random-tracker",
        "control",
        "LGF, a tracker with random weights",
        tracker="random",
        weight_of=LGF,
    ),
    _lgf(
        "lgf-image-encoder",
        "control",
        "LGF, features of the image encoder, without memory",
        teacher=("extract.teacher.features=image_encoder",),
        weight_of=LGF,
    ),
    _lgf("lgf-limbs", "control", "LGF, a teacher that knows where each limb is", limbs=True),
    _projector("lgf-projector", "LGF at a weight of 0.001: the projector alone learns", 0.001),
    _projector("lgf-limbs-projector", "lgf-limbs at a weight of 0.001", 0.001, limbs=True),
    _projector("lgf-narrow", "LGF at a weight of 2, projector of width 8", 2, _NARROW),
    _projector("lgf-narrow-0.1", "lgf-narrow at a weight of 0.1", 0.1, _NARROW),
    _projector("lgf-narrow-projector", "lgf-narrow at a weight of 0.001", 0.001, _NARROW),
    _projector("lgf-limbs-narrow", "lgf-limbs, projector of width 8", 2, _NARROW, limbs=True),
    _projector(
        "lgf-limbs-narrow-0.1", "lgf-limbs-narrow at a weight of 0.1", 0.1, _NARROW, limbs=True
    ),
    _projector(
        "lgf-limbs-narrow-projector",
        "lgf-limbs-narrow at a weight of 0.001",
        0.001,
        _NARROW,
        limbs=True,
    ),
    _open("pairs-backward", "pairs t+1 -> t", "train.lgf.pairs=backward"),
    _open("pairs-both", "pairs in both directions", "train.lgf.pairs=both"),
    _open("pairs-crossed", "each track on its unseen side", "train.lgf.pairs=crossed"),
    _open("block-1", "block 1 of 0 to 5", "train.block=1"),
    _open("block-2", "block 2", "train.block=2"),
    _open("block-4", "block 4", "train.block=4"),
    _open("window-3x3", "window 3x3", "train.lgf.radius=1"),
    _open("window-7x7", "window 7x7", "train.lgf.radius=3"),
    _open("temperature-0.05", "temperature 0.05", "train.lgf.temperature=0.05"),
    _open("temperature-0.2", "temperature 0.2", "train.lgf.temperature=0.2"),
    _open("latent-rate", "one feature map per latent frame", teacher=_LATENT),
    _open(
        "memory-attention",
        "features after memory attention",
        teacher=("extract.teacher.features=memory_attention",),
    ),
    _open(
        "memory-attention-0.02",
        "the same at temperature 0.02, where its Gram flow is not uniform",
        "train.lgf.temperature=0.02",
        teacher=("extract.teacher.features=memory_attention",),
    ),
    _open("foreground-5", "subject's tokens weigh 5 times", "train.lgf.foreground_weight=5"),
    _full("full-none", "all weights, diffusion loss only", "train.objectives=none"),
    _full(
        "full-lgf",
        "all weights, Local Gram Flow with weight 0.5",
        "train.objectives=[lgf]",
        _PAPER_WEIGHT,
    ),
    _full(
        "full-lgf-latent",
        "the same with one feature map per latent frame, temperature 0.2 and block 4",
        "train.objectives=[lgf]",
        _PAPER_WEIGHT,
        "train.lgf.temperature=0.2",
        "train.block=4",
        teacher=_LATENT,
    ),
    _full(
        "full-lgf-random-tracker",
        "full-lgf with a tracker of random weights",
        "train.objectives=[lgf]",
        _PAPER_WEIGHT,
        tracker="random",
    ),
    Arm(
        name="scratch-none",
        group="scratch",
        about="from random weights, diffusion loss only",
        train=("train.objectives=none",),
    ),
    _lgf(
        "scratch-lgf",
        "scratch",
        "from random weights, Local Gram Flow",
        weight_of=LGF,
    ),
)
ARM = {arm.name: arm for arm in ARMS}
