"""Download and read SAM2 checkpoints, and find the official configuration that they match."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stages.files.weight_checks import refuse_lfs_pointer


def download_checkpoint(hub_id: str, file: str, *, local_files_only: bool) -> Path:
    """Download an official checkpoint from the hub, or find it in the hub cache.

    Args:
        hub_id: For example facebook/sam2.1-hiera-large.
        file: File name in the repository.
        local_files_only: Look in the cache only.

    Raises:
        ValueError: The checkpoint is not available; the message says what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(hub_id, file, local_files_only=local_files_only))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"the SAM2 checkpoint {hub_id} is not on this machine and "
            + (
                "downloads are disabled"
                if local_files_only
                else f"could not be downloaded ({error})"
            )
            + f"; download it where there is a network (hf download {hub_id} {file} --local-dir "
            f"checkpoints) and set extract.teacher.checkpoint=checkpoints/{file}"
        ) from error


def read_checkpoint(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Memory-map the state dict of a checkpoint, without running code from it.

    Args:
        checkpoint: An official checkpoint, {"model": state dict}, or the state dict in a
            safetensors file.

    Raises:
        ValueError: The file is missing or unreadable, or holds something else.
    """
    if not checkpoint.is_file():
        raise ValueError(f"there is no SAM2 checkpoint at {checkpoint}")
    refuse_lfs_pointer(checkpoint)
    if checkpoint.suffix == ".safetensors":
        return _read_safetensors(checkpoint)
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a readable PyTorch checkpoint: {error}") from error
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise ValueError(
            f"{checkpoint} is not a SAM2 checkpoint: it must hold {{'model': state dict}}"
        )
    return weights


def _read_safetensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(checkpoint)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{checkpoint} is not a readable safetensors file: {error}") from error


@dataclass(frozen=True, slots=True)
class _Architecture:
    """The values that distinguish the official models."""

    embed_dim: int
    num_blocks: int
    version_2_1: bool

    @classmethod
    def of_weights(cls, weights: Mapping[str, torch.Tensor]) -> "_Architecture | None":
        trunk = "image_encoder.trunk."
        stem = weights.get(f"{trunk}patch_embed.proj.weight")
        blocks = {key.split(".")[3] for key in weights if key.startswith(f"{trunk}blocks.")}
        if stem is None:
            return None
        return cls(stem.shape[0], len(blocks), "no_obj_embed_spatial" in weights)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "_Architecture":
        trunk = config["image_encoder"]["trunk"]
        # The defaults of sam2's Hiera, since sam2_hiera_b+.yaml omits some.
        return cls(
            trunk.get("embed_dim", 96),
            sum(trunk.get("stages", (2, 3, 16, 3))),
            bool(config.get("no_obj_embed_spatial", False)),
        )


def find_matching_config(
    weights: Mapping[str, torch.Tensor], configs: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Return the name of the configuration that a checkpoint matches.

    Args:
        weights: A checkpoint's tensors.
        configs: The official configurations by name, as read by `build.load_sam2_config`.

    Returns:
        None if none matches.
    """
    architecture = _Architecture.of_weights(weights)
    for name, config in configs.items():
        if architecture == _Architecture.of_config(config):
            return name
    return None


def differences(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> list[str]:
    """Describe each tensor whose name or shape differs between a model and a checkpoint."""
    return [
        f"{key} is {_shape(found, key)}, expected {_shape(expected, key)}"
        for key in sorted({*expected, *found})
        if _shape(expected, key) != _shape(found, key)
    ]


def _shape(weights: Mapping[str, torch.Tensor], key: str) -> str:
    return str(list(weights[key].shape)) if key in weights else "absent"
