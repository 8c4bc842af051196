"""The settings of a Gram flow's store, made from those of the features it comes from.

Extraction, derivation and what reads either form use them.
"""

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.teacher_store.config import FlowDtype, StoredPairs
from stages.teacher_store.gram_flow import FLOAT16_STEP, flow_arrays_spec

_FLOWS: dict[StoredPairs, str] = {
    "forward": "cosine of each token and its window in the next map; 0 outside the grid",
    "crossed": (
        "cosine of each token and its window, 0 outside the grid: gram_flow of the backward track, "
        "in the next map; gram_flow_back of the forward track, from each next map to this one"
    ),
}


def gram_flow_settings(
    teacher: StoreSettings,
    *,
    radius: int,
    dtype: FlowDtype,
    token_grid: tuple[int, int],
    pairs: StoredPairs = "forward",
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
        pairs: which similarities are stored.

    Raises:
        ValueError: The store holds no features, has a single map per clip, lies on another grid,
            or holds no two tracks for `crossed`.
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
    if pairs == "crossed":
        check_both_tracks(teacher, "the teacher", wanted_by="extract.gram_flow.pairs=crossed")
    values: dict[str, JSON] = {
        **teacher.values,
        "grid": [*token_grid],
        "features_grid": [height, width],
        "features_dtype": features.dtype,
        "radius": radius,
        "pairs": pairs,
        "gram_flow": _FLOWS[pairs],
        "rounded_to": FLOAT16_STEP if dtype == "float16" else None,
    }
    arrays = flow_arrays_spec(maps - 1, *token_grid, radius, dtype, stored=pairs)
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


def forward_share(teacher: StoreSettings) -> float | None:
    """Share of the forward track in features whose parts are pairs of tracks, fused in Gram-flow
    space; None for others."""
    values = teacher.values
    share, parts = values.get("forward_weight"), values.get("parts")
    paired = values.get("fusion") == "gram_flow" and isinstance(parts, int) and parts % 2 == 0
    return float(share) if paired and isinstance(share, int | float) else None


def check_both_tracks(teacher: StoreSettings, name: str, *, wanted_by: str) -> None:
    """Refuse features of which the two tracks cannot be had apart (`ValueError`).

    Args:
        teacher: of the features' store.
        name: of the store, for the message.
        wanted_by: the setting that needs both tracks, for the message.
    """
    share = forward_share(teacher)
    if share is None or not 0.0 < share < 1.0:
        held = (
            f"the fusion {teacher.values.get('fusion')}, of which they cannot be had apart"
            if share is None
            else f"a forward share of {share:g}, which leaves one of them out"
        )
        raise ValueError(
            f"{wanted_by} compares each direction with a track of its own, and {name} has {held}; "
            "extract with extract.teacher.fusion=gram_flow and extract.teacher.forward_weight=0.5"
        )


def valid_spec(maps: int) -> ArraySpec:
    """Which maps show every subject in every direction: `valid` of every form, 0 or 1."""
    return ArraySpec(dtype="uint8", shape=(maps,), dimension_names=("t",))
