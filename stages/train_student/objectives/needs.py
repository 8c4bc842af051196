"""Stores that the auxiliary losses read, and checks that these hold what the losses need."""

from importlib.util import find_spec

from cache_schema import StoreSettings
from stages.teacher_store.settings import check_both_tracks, stored_forward_weight
from stages.train_student.config import KIND_OF_FORM, TrainConfig


def kinds_needed(config: TrainConfig) -> tuple[str, ...]:
    """Store kinds to read in addition to text and latents: the teacher's, then masks.

    Raises:
        ValueError: an objective cannot use `train.teacher_form`, or its kernel is not installed.
    """
    if "lgf" in config.objectives and config.lgf.kernel == "triton" and not find_spec("triton"):
        raise ValueError(
            "train.lgf.kernel=triton needs the package triton, which CUDA builds of torch bring; "
            "install it (pip install triton), or set train.lgf.kernel=torch"
        )
    chosen = set(config.objectives)
    if config.teacher_form == "gram_flow":
        _check_gram_flow_suffices(config)
    kinds = [KIND_OF_FORM[config.teacher_form]] if chosen - {"mask"} else []
    if "mask" in chosen or ("lgf" in chosen and config.lgf.foreground_weight != 1.0):
        kinds.append("masks")
    return tuple(kinds)


def check_teacher(config: TrainConfig, teacher: StoreSettings | None, name: str) -> None:
    """Reject a teacher store without the tracks or pairs that `train.lgf` compares.

    Args:
        config: names the objectives and their settings.
        teacher: settings of the store of `train.teacher_form`, existing or planned; None if no
            objective reads one.
        name: the store's name, for the message.

    Raises:
        ValueError: names the store and what it lacks.
    """
    if teacher is None or "lgf" not in config.objectives:
        return
    if teacher.kind == "gram_flow":
        _check_pairs(config, teacher, name)
        return
    if config.lgf.pairs == "crossed":
        check_both_tracks(teacher, name, wanted_by="train.lgf.pairs=crossed")
    directions, share = config.lgf.directions, stored_forward_weight(teacher)
    if directions == "fused":
        return
    if share is None:
        raise ValueError(
            f"train.lgf.directions={directions} needs features fused in Gram-flow space, from "
            f"which both directions can be recovered; those of {name} are not: extract with "
            "extract.teacher.fusion=gram_flow, or train with train.lgf.directions=fused"
        )
    if directions == "forward" and share == 0.0:
        raise ValueError(
            f"train.lgf.directions=forward cannot use {name}, whose forward direction has weight "
            "0; extract with extract.teacher.forward_weight=0.5"
        )


def _check_pairs(config: TrainConfig, flow: StoreSettings, name: str) -> None:
    """Similarities of fused features can be reversed; per-track ones only fit `crossed`."""
    pairs, held = config.lgf.pairs, flow.values.get("pairs")
    needed = "crossed" if pairs == "crossed" else "forward"
    if held != needed:
        raise ValueError(
            f"{name} holds a Gram flow with pairs {held}; train.lgf.pairs={pairs} needs pairs "
            f"{needed}: make it with sam2vx-pipeline cache derive gram-flow "
            f"extract.gram_flow.pairs={needed} or with extract-features, and name it in "
            "train.stores.gram_flow; or train with train.teacher_form=features"
        )


def _check_gram_flow_suffices(config: TrainConfig) -> None:
    unmet = [f"train.objectives={name}" for name in config.objectives if name in _NEED_FEATURES]
    if "lgf" in config.objectives and config.lgf.directions != "fused":
        unmet.append(f"train.lgf.directions={config.lgf.directions}")
    if unmet:
        raise ValueError(
            f"{' and '.join(unmet)} cannot be computed from a stored Gram flow, which holds "
            "only similarities; train with train.teacher_form=features"
        )


_NEED_FEATURES = ("repa", "token-relation")
"""Objectives that compare features."""
