"""Store settings of a Gram flow, derived from those of the teacher features."""

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
    """Return the store settings of the Gram flow of a teacher store's features.

    They do not depend on whether the features were stored earlier or are written in the same run.
    Values are those of the features, except: `grid` is the token grid, `features_dtype` and
    `features_grid` describe the features, and `rounded_to` is the step of a float16 flow.

    Args:
        teacher: Settings of the teacher store.
        radius: Radius of the window in tokens.
        dtype: Storage dtype of the flow.
        token_grid: Rows and columns of the student's tokens; features on SAM2's own grid are
            resampled to it.
        pairs: Which similarities are stored.

    Raises:
        ValueError: The store holds no features, has one map per clip or another grid, or lacks
            the separate tracks that `crossed` needs.
    """
    features = teacher.arrays.get("features")
    if teacher.kind != "teacher" or features is None or len(features.shape) != 4:
        raise ValueError(
            f"a Gram flow is computed from the features of a teacher store; this store is of kind "
            f"{teacher.kind!r} and holds {', '.join(teacher.arrays)}"
        )
    maps, height, width, _ = features.shape
    if maps < 2:
        raise ValueError(f"a Gram flow needs at least two maps per clip; the teacher has {maps}")
    if native_parts(teacher) is None and token_grid != (height, width):
        raise ValueError(
            f"the teacher's features are on a grid of {height}x{width} tokens, but data.height and "
            f"data.width make {token_grid[0]}x{token_grid[1]}; set these to what the features were "
            "extracted for, or extract with extract.teacher.grid=native, which supports any size"
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
    """Return the number of channel parts of features on SAM2's own grid; None on the student's.

    Raises:
        ValueError: The features are on SAM2's own grid but `parts` is missing or wrong.
    """
    if teacher.values.get("grid_source") != "native":
        return None
    parts = teacher.values.get("parts")
    if type(parts) is not int or parts < 1 or teacher.arrays["features"].shape[-1] % parts:
        raise ValueError(
            f"features of {teacher.arrays['features'].shape[-1]} channels on SAM2's own grid are "
            f"resampled in equal parts, but fall into {parts} parts; extract them again"
        )
    return parts


def stored_forward_weight(teacher: StoreSettings) -> float | None:
    """Return the forward track's weight in features fused in Gram-flow space, whose parts are pairs
    of tracks; None for others."""
    values = teacher.values
    share, parts = values.get("forward_weight"), values.get("parts")
    paired = values.get("fusion") == "gram_flow" and isinstance(parts, int) and parts % 2 == 0
    return float(share) if paired and isinstance(share, int | float) else None


def check_both_tracks(teacher: StoreSettings, name: str, *, wanted_by: str) -> None:
    """Raise ValueError if the two tracks cannot be separated in the features.

    Args:
        teacher: Settings of the teacher store.
        name: Name of the store, for the message.
        wanted_by: Setting that needs both tracks, for the message.
    """
    share = stored_forward_weight(teacher)
    if share is None or not 0.0 < share < 1.0:
        held = (
            f"the fusion {teacher.values.get('fusion')}, which does not keep the tracks separate"
            if share is None
            else f"a forward share of {share:g}, which omits one of them"
        )
        raise ValueError(
            f"{wanted_by} compares each direction with a track of its own, and {name} has {held}; "
            "extract with extract.teacher.fusion=gram_flow and extract.teacher.forward_weight=0.5"
        )


def valid_spec(maps: int) -> ArraySpec:
    """Spec of `valid`: 1 for maps on which every track sees every subject, else 0."""
    return ArraySpec(dtype="uint8", shape=(maps,), dimension_names=("t",))
