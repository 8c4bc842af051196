"""The cache as training reads it: one store of each kind, joined by clip key, checked to fit.

Everything here happens before a weight is loaded. The dataset reads through `JoinedStores`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from cache_schema import StoreReader, find_store
from stages.base_facts import VAE_SPATIAL_COMPRESSION, BaseFacts
from stages.clips.config import ClipsConfig
from stages.train_student.left_out import LeftOut, count_reasons, read_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedStores:
    """Readers of one store per kind and the keys to train on, sorted."""

    text: StoreReader
    latents: StoreReader
    teacher: StoreReader | None
    keys: tuple[str, ...]
    """Those that all stores hold, without those left out by name."""
    left_out: LeftOut

    @property
    def readers(self) -> dict[str, StoreReader]:
        """The stores that are read, by kind."""
        readers = {"text": self.text, "latents": self.latents}
        return readers if self.teacher is None else {**readers, "teacher": self.teacher}

    @property
    def teacher_maps(self) -> int | None:
        """Maps per clip in the teacher's store, or None without a teacher."""
        return None if self.teacher is None else array_shape(self.teacher, "features")[0]

    @property
    def native_parts(self) -> int | None:
        """Into how many parts the teacher's channels fall, if they must be brought to the grid.

        None without a teacher, and for one that is on the student's grid already.
        """
        if self.teacher is None or not _is_native(self.teacher):
            return None
        parts = self.teacher.settings.values["parts"]
        assert isinstance(parts, int), "check_stores has seen it"
        return parts


def join_stores(
    cache_root: Path,
    chosen: Mapping[str, str],
    *,
    with_teacher: bool,
    leave_out: Path | None = None,
) -> JoinedStores:
    """Open the stores and join them by key.

    Args:
        cache_root: folder of the stores.
        chosen: folder name per kind, needed where the cache holds several of that kind.
        with_teacher: whether the teacher's store is read.
        leave_out: manifest of clips to leave out (`left_out.read_keys`).

    Raises:
        ValueError: `chosen` names an unknown kind, the manifest is malformed, or no clip is left.
        CacheError: a store is missing, ambiguous or damaged.
    """
    named = frozenset() if leave_out is None else read_keys(leave_out)
    kinds = ("text", "latents", "teacher") if with_teacher else ("text", "latents")
    unknown = sorted(set(chosen) - {"text", "latents", "teacher"})
    if unknown:
        raise ValueError(f"train.stores names {unknown[0]!r}; kinds are text, latents and teacher")
    readers = {
        kind: StoreReader(find_store(cache_root, kind, folder=chosen.get(kind)), kind=kind)
        for kind in kinds
    }
    common = set.intersection(*(set(reader.keys) for reader in readers.values()))
    if not common:
        counts = ", ".join(f"{kind} {len(reader)}" for kind, reader in readers.items())
        raise ValueError(
            f"no clip is in every store of {cache_root} ({counts}); extract all kinds from the "
            "same clips with sam2vx-pipeline extract-features"
        )
    if not common - named:
        raise ValueError(
            f"train.leave_out {leave_out} names every one of the {len(common)} clips that are in "
            f"every store of {cache_root}; nothing is left to train on"
        )
    return JoinedStores(
        text=readers["text"],
        latents=readers["latents"],
        teacher=readers.get("teacher"),
        keys=tuple(sorted(common - named)),
        left_out=LeftOut(
            not_in_every_store={
                kind: len(reader) - len(common) for kind, reader in readers.items()
            },
            skipped={kind: count_reasons(reader.skipped) for kind, reader in readers.items()},
            manifest=None if leave_out is None else str(leave_out),
            named=len(common & named),
        ),
    )


def array_shape(reader: StoreReader, name: str) -> tuple[int, ...]:
    """Shape of one clip's array.

    Raises:
        ValueError: the store has no such array.
    """
    if name not in reader.settings.arrays:
        raise ValueError(
            f"{reader.path} has no array {name!r}, which training needs; it has "
            f"{', '.join(reader.settings.arrays)}"
        )
    return reader.settings.arrays[name].shape


def check_stores(stores: JoinedStores, facts: BaseFacts, clips: ClipsConfig) -> None:
    """Refuse stores that do not belong to this model, this training size, or each other.

    Raises:
        ValueError: naming the store, what it holds and what is needed.
    """
    height = clips.height // VAE_SPATIAL_COMPRESSION
    width = clips.width // VAE_SPATIAL_COMPRESSION
    frames, channels = clips.num_latent_frames, facts.latent_channels
    axes = "latent frames, channels, height, width"
    wanted = (frames, channels, height, width)
    for name in ("mean", "std"):
        _same(stores.latents, name, wanted, axes, "data.num_frames, data.height, data.width")
    if facts.image_to_video:
        for name in ("image_mean", "image_std"):
            _same(stores.latents, name, (1, *wanted[1:]), axes, "the image-to-video model")
    text = (facts.transformer["max_text_seq_length"], facts.transformer["text_embed_dim"])
    _same(stores.text, "embeds", text, "text length, text width", "the transformer")
    _check_learned_positions(facts, clips, height, width)
    _check_scaling(stores.latents, facts)
    if stores.teacher is not None:
        _check_teacher(stores.teacher, facts.token_grid(frames, height, width)[1:], clips)
    _check_one_origin(stores)


def _same(reader: StoreReader, name: str, wanted: tuple[int, ...], axes: str, because: str) -> None:
    found = array_shape(reader, name)
    if found != wanted:
        raise ValueError(
            f"{reader.path} holds {name} of {found} ({axes}); {because} need {wanted}; choose "
            f"another store with train.stores.{reader.settings.kind}, or extract again"
        )


def _is_native(teacher: StoreReader) -> bool:
    """Whether its features lie on SAM2's own grid and are resampled when they are read."""
    return teacher.settings.values.get("grid_source") == "native"


def _check_teacher(teacher: StoreReader, grid: tuple[int, ...], clips: ClipsConfig) -> None:
    maps, *found_grid, channels = array_shape(teacher, "features")
    _same(teacher, "valid", (maps,), "maps", "its features")
    if _is_native(teacher):
        parts = teacher.settings.values.get("parts")
        if type(parts) is not int or parts < 1 or channels % parts:
            raise ValueError(
                f"{teacher.path} has {channels} channels on SAM2's own grid and says that they "
                f"fall into {parts} parts; without equal parts they cannot be resampled: extract "
                "again"
            )
    elif tuple(found_grid) != grid:
        raise ValueError(
            f"{teacher.path} holds features on a grid of {tuple(found_grid)} tokens; data.height "
            f"and data.width make {grid}; choose another store with train.stores.teacher, or "
            "extract again"
        )
    if maps not in (clips.num_frames, clips.num_latent_frames):
        raise ValueError(
            f"{teacher.path} holds {maps} maps per clip; clips of {clips.num_frames} frames have "
            f"{clips.num_frames} or {clips.num_latent_frames}; choose another store with "
            "train.stores.teacher, or extract again"
        )


def _check_learned_positions(facts: BaseFacts, clips: ClipsConfig, height: int, width: int) -> None:
    config = facts.transformer
    trained = config["sample_height"], config["sample_width"]
    if config["use_learned_positional_embeddings"] and trained != (height, width):
        raise ValueError(
            f"the base model has learned positions and runs at one size alone, "
            f"{trained[0] * VAE_SPATIAL_COMPRESSION}x{trained[1] * VAE_SPATIAL_COMPRESSION}; "
            f"data.height x data.width is {clips.height}x{clips.width}"
        )


def _check_scaling(latents: StoreReader, facts: BaseFacts) -> None:
    """The latents' VAE and the base model's must agree on what training multiplies by."""
    found = latents.settings.values.get("base")
    if not isinstance(found, dict):
        return
    for name in ("scaling_factor", "invert_scale_latents"):
        if name in found and found[name] != facts.vae[name]:
            raise ValueError(
                f"{latents.path} was made with a VAE whose {name} is {found[name]}; the base "
                f"model's is {facts.vae[name]}; extract the latents with this model"
            )


def _check_one_origin(stores: JoinedStores) -> None:
    """Stores that say how their clips were cut must say the same."""
    origins: dict[str, Any] = {
        kind: reader.settings.values["clips"]
        for kind, reader in stores.readers.items()
        if "clips" in reader.settings.values
    }
    if "teacher" not in origins or "latents" not in origins:
        return
    any_size = stores.teacher is not None and _is_native(stores.teacher)
    if _cut(origins["teacher"], any_size) != _cut(origins["latents"], any_size):
        raise ValueError(
            f"the teacher's clips were cut as {origins['teacher']}, the latents' as "
            f"{origins['latents']}; training needs both from the same frames: choose stores with "
            "train.stores, or extract again"
        )


def _cut(origin: dict[str, Any], any_size: bool) -> dict[str, Any]:
    """How clips were cut; with `any_size`, the shape of the frame stands for its size.

    SAM2 sees every frame at its own size: of one shape, they show the same picture.
    """
    if not any_size or not {"height", "width"} <= origin.keys():
        return origin
    shape = Fraction(origin["height"], origin["width"])
    return {k: v for k, v in origin.items() if k not in ("height", "width")} | {"shape": shape}
