"""Which stores the auxiliary losses read, and whether these can serve them; `train` asks first."""

from importlib.util import find_spec

from cache_schema import StoreReader
from stages.train_student.config import KIND_OF_FORM, TrainConfig
from stages.train_student.teacher import TeacherLayout


def kinds_needed(config: TrainConfig) -> tuple[str, ...]:
    """The kinds of store to read beside text and latents: of the teacher, then masks.

    Raises:
        ValueError: `train.teacher_form` cannot serve an objective, or its kernel is not installed.
    """
    if "lgf" in config.objectives and config.lgf.kernel == "triton" and not find_spec("triton"):
        raise ValueError(
            "train.lgf.kernel=triton needs the package triton, which CUDA builds of torch bring; "
            "install it (pip install triton), or set train.lgf.kernel=torch"
        )
    chosen = set(config.objectives)
    if config.teacher_form == "gram_flow":
        _check_gram_flow_serves(config)
    kinds = [KIND_OF_FORM[config.teacher_form]] if chosen - {"mask"} else []
    if "mask" in chosen or ("lgf" in chosen and config.lgf.foreground_weight != 1.0):
        kinds.append("masks")
    return tuple(kinds)


def check_layout(config: TrainConfig, layout: TeacherLayout, store: StoreReader | None) -> None:
    """Refuse a teacher whose directions cannot be told apart where `lgf.directions` needs it.

    Args:
        layout: of the teacher store.
        store: it, for the message.

    Raises:
        ValueError: naming the store and what it lacks.
    """
    directions = config.lgf.directions
    if store is None or "lgf" not in config.objectives or directions == "fused":
        return
    if layout.forward_weight is None or layout.parts % 2:
        raise ValueError(
            f"train.lgf.directions={directions} needs features fused in Gram-flow space, of which "
            f"both directions can be had again; those of {store.path} are not: extract with "
            "extract.teacher.fusion=gram_flow, or train with train.lgf.directions=fused"
        )
    if directions == "forward" and layout.forward_weight == 0.0:
        raise ValueError(
            f"train.lgf.directions=forward finds nothing in {store.path}, whose forward direction "
            "has a share of 0; extract with extract.teacher.forward_weight=0.5, which is usual"
        )


def _check_gram_flow_serves(config: TrainConfig) -> None:
    wanting = [f"train.objectives={name}" for name in config.objectives if name in _FEATURES_ALONE]
    if "lgf" in config.objectives and config.lgf.directions != "fused":
        wanting.append(f"train.lgf.directions={config.lgf.directions}")
    if wanting:
        raise ValueError(
            f"{' and '.join(wanting)} cannot be had from a stored Gram flow, which holds "
            "similarities alone; train with train.teacher_form=features"
        )


_FEATURES_ALONE = ("repa", "token-relation")
"""Objectives that compare features."""
