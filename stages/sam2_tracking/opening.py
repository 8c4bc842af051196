"""Find, check and build a tracker; its library follows from the checkpoint.

A folder in transformers' format, or the hub id of one, is opened with transformers; a checkpoint
file, or the hub id of an official SAM2, with the sam2 package. sam2 is imported only then.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from stages.files.hashes import sha256_of_file
from stages.sam2_tracking.model import TrackerSpec
from stages.sam2_tracking.transformers_files import (
    build_transformers_tracker,
    check_transformers_tracker,
    download_tracker,
    hash_of_weights,
    is_transformers_folder,
    read_stride,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_SUFFIXES = (".pt", ".pth", ".safetensors")
_SAM2_STRIDE = 16
"""Pixels per token of every official SAM2."""


def find_checkpoint(name: str, *, download: bool = True) -> Path:
    """Return a checkpoint's file, or its folder in transformers' format.

    Args:
        name: A path on this machine, or a hub id: facebook/sam2.1-hiera-large, facebook/sam3.
        download: Download what is not in the hub cache.

    Raises:
        ValueError: `name` is none of these, gated, another model, or the download fails.
    """
    path = Path(name).expanduser()
    if path.is_file() or is_transformers_folder(path):
        return path
    if _is_transformers_id(name):
        return download_tracker(name, local_files_only=not download)
    return _sam2_package().find_checkpoint(name, download=download)


def config_source(name: str, config: str | None) -> str | Path | None:
    """Return where a hub checkpoint's configuration is, without its weights.

    Args:
        name: A hub id.
        config: A configuration that overrides that of an official SAM2.

    Returns:
        The name of a SAM2 configuration or its YAML file; or a folder in transformers' format,
        whose config.json is downloaded. None if there is no such checkpoint.

    Raises:
        ValueError: The download fails, or it is another kind of model.
    """
    if _is_transformers_id(name):
        return download_tracker(name, weights=False)
    official = _sam2_package().HUB_CHECKPOINTS
    return config or official[name][0] if name in official else None


def pixels_per_token(name: str, *, image_size: int) -> int:
    """Return the pixels of a tracker's input per token of its features, without its weights.

    Args:
        name: As for `find_checkpoint`; of a hub id in transformers' format, config.json is
            downloaded.
        image_size: Side in pixels of the square input.

    Raises:
        ValueError: The download fails, it is another kind of model, or the size does not suit it.
    """
    folder = Path(name).expanduser()
    if _is_transformers_id(name):
        folder = download_tracker(name, weights=False)
    if is_transformers_folder(folder):
        return read_stride(folder, image_size=image_size)
    return _SAM2_STRIDE


def hash_of_checkpoint(checkpoint: Path) -> str:
    """Return the SHA-256 of the weights of a checkpoint from `find_checkpoint`."""
    return hash_of_weights(checkpoint) if checkpoint.is_dir() else sha256_of_file(checkpoint)


def check_tracker(
    config: str | Path | None, checkpoint: Path, *, image_size: int | None = None
) -> TrackerSpec:
    """Check that a checkpoint can be used, without loading its weights.

    Args:
        config: For a checkpoint file: see `build.check_sam2`.
        checkpoint: From `find_checkpoint`.
        image_size: Side in pixels of the square input; None keeps the configuration's.

    Raises:
        ValueError: The weights do not match their configuration, or the size does not suit it.
    """
    if checkpoint.is_dir():
        _refuse_config(config, checkpoint)
        return check_transformers_tracker(checkpoint, image_size=image_size)
    return _sam2_package().check_sam2(config, checkpoint, image_size=image_size)


def build_tracker(
    config: str | Path | None,
    checkpoint: Path,
    *,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """Build a tracker's network and load its weights.

    Args:
        config: For a checkpoint file: see `build.build_sam2`.
        checkpoint: From `find_checkpoint`.
        image_size: Side in pixels of the square input; None keeps the configuration's.
        device: Device of the network.

    Returns:
        A SAM2Base, or a Sam2VideoModel, EdgeTamVideoModel or Sam3TrackerVideoModel, for `Tracker`.

    Raises:
        ValueError: See `check_tracker`.
    """
    if checkpoint.is_dir():
        _refuse_config(config, checkpoint)
        return build_transformers_tracker(checkpoint, image_size=image_size, device=device)
    return _sam2_package().build_sam2(config, checkpoint, image_size=image_size, device=device)


def build_without_weights(source: str | Path, *, image_size: int) -> Any:
    """Build a network on the meta device.

    Args:
        source: A SAM2 configuration's name or YAML file, or a folder in transformers' format.
        image_size: Side in pixels of the square input.
    """
    if is_transformers_folder(Path(source)):
        return build_transformers_tracker(Path(source), image_size=image_size, device="meta")
    return _sam2_package().build_sam2(source, None, image_size=image_size, device="meta")


def _is_transformers_id(name: str) -> bool:
    """Whether a name has the form of a hub id and is not that of an official SAM2."""
    if not _HUB_ID.fullmatch(name) or name.endswith(_FILE_SUFFIXES) or Path(name).exists():
        return False
    return not name.startswith("facebook/sam2")


def _refuse_config(config: str | Path | None, checkpoint: Path) -> None:
    if config is not None:
        raise ValueError(
            f"extract.teacher.config={config} is for checkpoints of the sam2 package, but "
            f"{checkpoint} is in transformers' format, with a config.json of its own; leave it out"
        )


def _sam2_package() -> ModuleType:
    try:
        from stages.sam2_tracking import build
    except ImportError as error:
        raise ValueError(
            f"this checkpoint needs the sam2 package, which cannot be imported ({error}): pip "
            "install sam2==1.1.0; or use the same weights through transformers: hf download "
            "facebook/sam2.1-hiera-large --include config.json model.safetensors --local-dir "
            "checkpoints/sam2.1-hiera-large, and name that folder as extract.teacher.checkpoint"
        ) from error
    return build
