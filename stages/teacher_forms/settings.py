"""The settings of a Gram flow's store, made from those of the features it comes from.

Extraction, derivation and what reads either form use them.
"""

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.teacher_forms.config import FlowDtype
from stages.teacher_forms.gram_flow import FLOAT16_STEP, flow_arrays_spec

_FLOW = "cosine of each token and its window in the next map; 0 outside the grid"


def gram_flow_settings(
    teacher: StoreSettings, *, radius: int, dtype: FlowDtype, token_grid: tuple[int, int]
) -> StoreSettings:
    """Settings of the Gram flow of a teacher store's features.

    They are the same whether the features were stored before or are written beside it. Its values
    are those of the features, with `grid` the token grid, and `features_dtype` and `features_grid`
    what the similarities were computed from;
    `rounded_to` is the step of a float16 flow.

    Args:
        teacher: of the features' store.
        radius: half the window.
        dtype: of the stored flow.
        token_grid: rows and columns of the student's tokens; features on SAM2's own grid are
            resampled to it.

    Raises:
        ValueError: The store holds no features, has a single map per clip, or lies on another grid.
    """
    features = teacher.arrays.get("features")
    if teacher.kind != "teacher" or features is None or len(features.shape) != 4:
        raise ValueError(
            f"a Gram flow is made from the features of a teacher store; this one is of kind "
            f"{teacher.kind!r} and holds {', '.join(teacher.arrays)}"
        )
    maps, height, width, _ = features.shape
    if maps < 2:
        raise ValueError(f"a Gram flow needs two maps a clip or more; the teacher has {maps}")
    if native_parts(teacher) is None and token_grid != (height, width):
        raise ValueError(
            f"the teacher's features lie on a grid of {height}x{width} tokens, and data.height and "
            f"data.width make {token_grid[0]}x{token_grid[1]}; set these to what the features were "
            "extracted for, or extract with extract.teacher.grid=native, which serves any size"
        )
    values: dict[str, JSON] = {
        **teacher.values,
        "grid": [*token_grid],
        "features_grid": [height, width],
        "features_dtype": features.dtype,
        "radius": radius,
        "gram_flow": _FLOW,
        "rounded_to": FLOAT16_STEP if dtype == "float16" else None,
    }
    arrays = flow_arrays_spec(maps - 1, *token_grid, radius, dtype)
    return StoreSettings(
        kind="gram_flow", arrays=arrays | {"valid": valid_spec(maps)}, values=values
    )


def native_parts(teacher: StoreSettings) -> int | None:
    """Parts of the features' channels where they lie on SAM2's own grid; None where they do not.

    Raises:
        ValueError: They lie there and do not say how many parts they have.
    """
    if teacher.values.get("grid_source") != "native":
        return None
    parts = teacher.values.get("parts")
    if type(parts) is not int or parts < 1 or teacher.arrays["features"].shape[-1] % parts:
        raise ValueError(
            f"features of {teacher.arrays['features'].shape[-1]} channels on SAM2's own grid say "
            f"that they fall into {parts} parts; without equal parts they cannot be resampled: "
            "extract again"
        )
    return parts


def valid_spec(maps: int) -> ArraySpec:
    """Which maps show every subject in every direction: `valid` of every form, 0 or 1."""
    return ArraySpec(dtype="uint8", shape=(maps,), dimension_names=("t",))
