"""Checks that stores match the model, the clip size and each other, made before loading weights."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from cache_schema import StoreReader
from stages.clips.config import ClipsConfig
from stages.local_gram_flow import radius_of_window
from stages.students.student import VAE_SPATIAL_COMPRESSION, StudentConfigs
from stages.teacher_store.settings import native_parts
from stages.train_student.data.open_stores import base_settings
from stages.train_student.data.stores import JoinedStores, array_shape
from stages.train_student.model.teacher import TeacherLayout

_FRAME_AXES = "frames, height, width"
_PAIR_AXES = "pairs, rows, columns, neighbours"


def check_stores(
    stores: JoinedStores, configs: StudentConfigs, clips: ClipsConfig, *, radius: int
) -> None:
    """Reject stores that do not match the model, the clip size or each other.

    Args:
        radius: window radius of the objective, which a stored Gram flow must cover.

    Raises:
        ValueError: names the store, what it holds and what is needed.
    """
    height = clips.height // VAE_SPATIAL_COMPRESSION
    width = clips.width // VAE_SPATIAL_COMPRESSION
    frames, channels = clips.num_latent_frames, configs.latent_channels
    axes = "latent frames, channels, height, width"
    expected = (frames, channels, height, width)
    for name in ("mean", "std"):
        _check_shape(
            stores.latents, name, expected, axes, "data.num_frames, data.height, data.width"
        )
    if configs.image_to_video:
        _check_condition(stores.latents, configs, clips)
    text, text_axes = configs.text_shape, "text length, text width"
    _check_shape(stores.text, "embeds", text, text_axes, "the transformer")
    configs.check_training_size(clips)
    for reader, why in (
        (stores.latents, configs.check_latents(base_settings(stores.latents))),
        (stores.text, configs.check_text(base_settings(stores.text))),
    ):
        if why is not None:
            kind = reader.settings.kind
            raise ValueError(
                f"{reader.path} was made with {why}; extract the {kind} with this model"
            )
    if stores.teacher is not None:
        grid = configs.token_grid(frames, height, width)[1:]
        if stores.teacher_form == "features":
            _check_features(stores.teacher, grid, clips)
        else:
            _check_gram_flow(stores.teacher, grid, clips, radius)
        _check_same_origin(stores.teacher, stores.latents)
    if stores.visual is not None:
        _check_visual(stores.visual, configs.token_grid(frames, height, width)[1:], clips)
        _check_same_origin(stores.visual, stores.latents)
    if stores.masks is not None:
        _check_masks(stores.masks, clips)
        _check_same_origin(stores.masks, stores.latents)


def _check_shape(
    reader: StoreReader, name: str, expected: tuple[int, ...], axes: str, source: str
) -> None:
    """`source` names, in the message, what determines the expected shape."""
    found = array_shape(reader, name)
    if found != expected:
        raise ValueError(
            f"{reader.path} holds {name} of {found} ({axes}); {source} need {expected}; choose "
            f"another store with train.stores.{reader.settings.kind}, or extract again"
        )


def _check_condition(latents: StoreReader, configs: StudentConfigs, clips: ClipsConfig) -> None:
    """Check the arrays of the image-to-video condition."""
    for name in configs.first_frame_arrays(clips, draws=1):
        array_shape(latents, name)
    if lacking := configs.check_condition(latents.settings, clips):
        raise ValueError(
            f"{latents.path} {lacking}; extract latents again, or choose another store with "
            "train.stores.latents"
        )


def _check_stored_features(store: StoreReader) -> tuple[int, tuple[int, int]]:
    """Check the arrays of features; return the maps per clip, and the grid."""
    maps, rows, columns, _ = array_shape(store, "features")
    dtype = store.settings.arrays["features"].dtype
    if dtype not in ("float16", "int8"):
        raise ValueError(f"{store.path} holds features of {dtype}, not of float16 or int8")
    _check_companions(store, "features", ["scale"] if dtype == "int8" else [])
    _check_shape(store, "valid", (maps,), "maps", "its features")
    return maps, (rows, columns)


def _check_visual(visual: StoreReader, grid: tuple[int, int], clips: ClipsConfig) -> None:
    maps, stored_grid = _check_stored_features(visual)
    layout = TeacherLayout.of(visual.settings)
    if not layout.native:
        _check_grid(visual, stored_grid, grid)
    if layout.frames_per_map is None:
        _check_maps(visual, maps, clips)
    elif maps * layout.frames_per_map != clips.num_frames - 1:
        raise ValueError(
            f"{visual.path} holds {maps} maps of {layout.frames_per_map} frames per clip, which do "
            f"not cover the {clips.num_frames - 1} frames after the first of clips of "
            f"{clips.num_frames}; choose another store with train.stores.visual, or extract again"
        )


def _check_features(teacher: StoreReader, grid: tuple[int, int], clips: ClipsConfig) -> None:
    maps, stored_grid = _check_stored_features(teacher)
    try:
        native = native_parts(teacher.settings) is not None
    except ValueError as error:
        raise ValueError(f"{teacher.path}: {error}") from error
    if not native:
        _check_grid(teacher, stored_grid, grid)
    _check_maps(teacher, maps, clips)


def _check_gram_flow(
    teacher: StoreReader, grid: tuple[int, int], clips: ClipsConfig, radius: int
) -> None:
    pairs, rows, columns, neighbours = array_shape(teacher, "gram_flow")
    dtype = teacher.settings.arrays["gram_flow"].dtype
    if dtype not in ("float16", "uint8"):
        raise ValueError(f"{teacher.path} holds a Gram flow of {dtype}, not of float16 or uint8")
    stored = radius_of_window(neighbours)
    _check_companions(teacher, "gram_flow", ["low", "step"] if dtype == "uint8" else [])
    if teacher.settings.values.get("pairs") == "crossed":
        _check_shape(
            teacher,
            "gram_flow_back",
            array_shape(teacher, "gram_flow"),
            _PAIR_AXES,
            "its gram_flow",
        )
        _check_companions(
            teacher, "gram_flow_back", ["low_back", "step_back"] if dtype == "uint8" else []
        )
    _check_shape(teacher, "valid", (pairs + 1,), "maps", "its gram_flow")
    _check_grid(teacher, (rows, columns), grid)
    _check_maps(teacher, pairs + 1, clips)
    if stored < radius:
        raise ValueError(
            f"{teacher.path} holds windows of radius {stored}; train.lgf.radius={radius} "
            f"needs {radius} or more: train with train.lgf.radius={stored}, or make a store "
            f"with extract.gram_flow.radius={radius}, using sam2vx-pipeline cache derive gram-flow "
            "or extract-features"
        )


def _check_masks(masks: StoreReader, clips: ClipsConfig) -> None:
    for name in ("forward", "backward"):
        if name == "forward" or name in masks.settings.arrays:
            shape = array_shape(masks, name)
            _check_shape(
                masks, name, (clips.num_frames, *shape[1:]), _FRAME_AXES, "data.num_frames"
            )
    _check_shape(masks, "valid", (clips.num_frames,), "frames", "its masks")


def _check_companions(teacher: StoreReader, name: str, companions: Sequence[str]) -> None:
    """Check the per-token arrays that are needed to decode 8-bit values."""
    for companion in companions:
        tokens = array_shape(teacher, name)[:3]
        _check_shape(teacher, companion, tokens, "maps, rows, columns", f"its {name}")


def _check_grid(teacher: StoreReader, found: tuple[int, int], grid: tuple[int, int]) -> None:
    if found != grid:
        raise ValueError(
            f"{teacher.path} is on a grid of {found} tokens; data.height and data.width give "
            f"{grid}; choose another store with train.stores.{teacher.settings.kind}, or extract "
            "again"
        )


def _check_maps(teacher: StoreReader, maps: int, clips: ClipsConfig) -> None:
    if maps not in (clips.num_frames, clips.num_latent_frames):
        raise ValueError(
            f"{teacher.path} holds {maps} maps per clip; clips of {clips.num_frames} frames have "
            f"{clips.num_frames} or {clips.num_latent_frames}; choose another store with "
            f"train.stores.{teacher.settings.kind}, or extract again"
        )


def _check_same_origin(other: StoreReader, latents: StoreReader) -> None:
    """Check that stores that record how their clips were cropped and sampled agree."""
    origins: list[Any] = [reader.settings.values.get("clips") for reader in (other, latents)]
    if None in origins:
        return
    any_size = other.settings.values.get("grid_source") == "native" or "forward" in (
        other.settings.arrays
    )
    if _comparable(origins[0], any_size) != _comparable(origins[1], any_size):
        raise ValueError(
            f"the clips of {other.path} were made with {origins[0]}, those of {latents.path} with "
            f"{origins[1]}; training needs both from the same frames: choose stores with "
            "train.stores, or extract again"
        )


def _comparable(origin: dict[str, Any], any_size: bool) -> dict[str, Any]:
    """Settings that determine a clip's frames; with `any_size`, the aspect ratio replaces the size.

    SAM2 resizes frames itself and masks are resampled, so stores of the same aspect ratio agree at
    any size. `buckets` selects clips, not crops, so it is ignored.
    """
    origin = {name: value for name, value in origin.items() if name != "buckets"}
    if not any_size or not {"height", "width"} <= origin.keys():
        return origin
    shape = Fraction(origin["height"], origin["width"])
    return {k: v for k, v in origin.items() if k not in ("height", "width")} | {"shape": shape}
