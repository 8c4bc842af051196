"""Trackers in transformers' format: a folder with config.json and safetensors, or a hub id."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from stages.files.hashes import sha256_of_files
from stages.files.hub import hub_files
from stages.files.weight_checks import check_weights, load_model, read_config, read_json
from stages.files.weight_checks import stored_tensors as stored_tensors_of
from stages.sam2_tracking.model import TrackerSpec

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_TIMM_BACKBONES = ("repvit_m1",)
"""Backbones of the timm package that a configuration may name: EdgeTAM's."""
_TIMM_ARGUMENTS = frozenset({"in_chans", "features_only", "out_indices"})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """A kind of tracker, by the model type in config.json."""

    title: str
    model: str
    """Class of transformers that tracks."""
    saved: str
    """Class of the checkpoint, which may hold more than the tracker."""


_FAMILIES = {
    "sam2_video": _Family(
        title="SAM2 and SAM2.1, such as facebook/sam2.1-hiera-large",
        model="Sam2VideoModel",
        saved="Sam2VideoModel",
    ),
    "edgetam_video": _Family(
        title="EdgeTAM, such as yonigozlan/EdgeTAM-hf",
        model="EdgeTamVideoModel",
        saved="EdgeTamVideoModel",
    ),
    "sam3_tracker_video": _Family(
        title="SAM3's tracker alone",
        model="Sam3TrackerVideoModel",
        saved="Sam3TrackerVideoModel",
    ),
    "sam3_video": _Family(
        title="SAM3, such as facebook/sam3",
        model="Sam3TrackerVideoModel",
        saved="Sam3VideoModel",
    ),
}
"""By `model_type` in config.json."""


def is_transformers_folder(path: Path) -> bool:
    """Whether a path is a model folder in transformers' format."""
    return (path / _CONFIG).is_file()


def download_tracker(hub_id: str, *, weights: bool = True, local_files_only: bool = False) -> Path:
    """Download a tracker in transformers' format, or find it in the hub cache.

    Args:
        hub_id: Such as facebook/sam3.
        weights: Download the weights, not only the configuration.
        local_files_only: Look in the cache only.

    Returns:
        The folder.

    Raises:
        ValueError: It is not available, gated, or no tracker; the message says what to do.
    """
    folder_name = f"checkpoints/{Path(hub_id).name}"

    def files(patterns: Sequence[str]) -> Path:
        return hub_files(
            hub_id,
            patterns,
            named=f"extract.teacher.checkpoint={hub_id}",
            remedy=f"download it where there is a network (hf download {hub_id} --include "
            f"config.json 'model*.safetensors*' --local-dir {folder_name}) and set "
            f"extract.teacher.checkpoint={folder_name}",
            local_files_only=local_files_only,
        )

    folder = files([_CONFIG])
    _family_of(folder)  # before gigabytes of another model are downloaded
    if not weights:
        return folder
    folder = files([_CONFIG, *_WEIGHTS])
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise ValueError(f"the weights of {hub_id} are not on this machine")
    return folder


def check_transformers_tracker(folder: Path, *, image_size: int | None = None) -> TrackerSpec:
    """Check that a folder's weights match its configuration, without loading them.

    Args:
        folder: Holds config.json and safetensors.
        image_size: Side in pixels of the square input; None keeps the configuration's.

    Raises:
        ValueError: See `build_transformers_tracker`.
    """
    family, document = _family_of(folder)
    config = _config(folder, family, document, image_size)
    check_weights(_class(family.model), folder, config=config, **_stored_as(family))
    return TrackerSpec(
        library=f"transformers.{family.model}",
        config={key: value for key, value in document.items() if key != "transformers_version"},
        config_name=None,
        hidden_dim=config.vision_config.fpn_hidden_size,
        mem_dim=config.memory_encoder_output_channels,
        stride=config.prompt_encoder_config.patch_size,
    )


def read_stride(folder: Path, *, image_size: int) -> int:
    """Return the pixels per token of a tracker, from its config.json alone.

    Raises:
        ValueError: It is another kind of model, or the size does not suit it.
    """
    family, document = _family_of(folder)
    return int(_config(folder, family, document, image_size).prompt_encoder_config.patch_size)


def build_transformers_tracker(
    folder: Path, *, image_size: int | None = None, device: str | torch.device = "cpu"
) -> Any:
    """Build a video tracker of transformers and load its weights.

    Args:
        folder: Holds config.json and safetensors.
        image_size: Side in pixels of the square input; None keeps the configuration's.
        device: Device of the model; meta builds it from config.json alone, for its shapes.

    Returns:
        A Sam2VideoModel, EdgeTamVideoModel or Sam3TrackerVideoModel in float32 and evaluation mode,
        without gradients.

    Raises:
        ValueError: The folder holds another kind of model, weights that do not match, or the size
            does not suit the model.
    """
    family, document = _family_of(folder)
    config = _config(folder, family, document, image_size)
    if torch.device(device).type == "meta":
        with init_empty_weights():
            model = _class(family.model)(config)
    else:
        model = load_model(
            _class(family.model),
            folder,
            config=config,
            dtype=torch.float32,
            **_stored_as(family),
        )
    return model.requires_grad_(False).eval().to(device)


def hash_of_weights(folder: Path) -> str:
    """Return the SHA-256 of the names and bytes of a folder's weight files."""
    files = {tensor.file.name for tensor in stored_tensors_of(folder, "model").values()}
    return sha256_of_files(folder, files)


def _family_of(folder: Path) -> tuple[_Family, dict[str, Any]]:
    """Return the family of a folder's model, and its configuration."""
    found = read_json(folder / _CONFIG).get("model_type")
    if found not in _FAMILIES:
        supported = "; ".join(f"{name} ({one.title})" for name, one in _FAMILIES.items())
        raise ValueError(
            f"{folder} holds a model of type {found!r}, which is not a tracker that is supported; "
            f"extract.teacher.checkpoint can be one of type {supported}; or a SAM2 checkpoint of "
            "the sam2 package (.pt or .safetensors)"
        )
    family = _FAMILIES[found]
    document = read_config(folder / _CONFIG, timm_backbones=_TIMM_BACKBONES)
    _check_backbone(folder, document)
    return family, document


def _check_backbone(folder: Path, document: dict[str, Any]) -> None:
    """Check what transformers would pass on to timm."""
    vision = document.get("vision_config")
    backbone = vision.get("backbone_config") if isinstance(vision, dict) else None
    if not isinstance(backbone, dict) or backbone.get("model_type") != "timm_wrapper":
        return
    arguments = backbone.get("model_args") or {}
    if not isinstance(arguments, dict) or not arguments.keys() <= _TIMM_ARGUMENTS:
        raise ValueError(
            f"{folder / _CONFIG}: model_args of the backbone may have {sorted(_TIMM_ARGUMENTS)} "
            f"only, got {arguments}; use the model's official files"
        )
    if find_spec("timm") is None:
        raise ValueError(
            f"{folder} has a backbone of the timm package ({backbone.get('architecture')}), which "
            'is not installed: pip install "sam2videox[edgetam]"'
        )


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _stored_as(family: _Family) -> dict[str, Any]:
    return {"stored_as": _class(family.saved), "timm_backbones": _TIMM_BACKBONES}


def _config(folder: Path, family: _Family, document: dict[str, Any], image_size: int | None) -> Any:
    """Return the tracker's configuration for the image size."""
    try:
        config = _class(family.saved).config_class.from_dict(document)
        if family.saved != family.model:
            config = config.tracker_config
        stride = int(config.prompt_encoder_config.patch_size)
        size = config.image_size if image_size is None else image_size
        _check_size(family, config, size, stride)
        if family.model == "Sam3TrackerVideoModel":
            config.image_size = size  # passes it on
        else:
            _set_size(config, size, stride)
    except (AttributeError, TypeError, KeyError) as error:  # the library barely checks its fields
        raise ValueError(
            f"{folder / _CONFIG} does not describe a {family.model} "
            f"({type(error).__name__}: {error}); download the model again"
        ) from error
    return config


def _check_size(family: _Family, config: Any, size: int, stride: int) -> None:
    multiple, usual = 2 * stride, 1024
    if family.model == "Sam3TrackerVideoModel":
        multiple, usual = stride, 72 * stride
    elif family.model == "EdgeTamVideoModel":
        # The perceiver divides the map into a square of windows, one per two-dimensional latent.
        multiple = stride * round(config.perceiver_resampler_num_latents_2d**0.5)
    if size % multiple:
        raise ValueError(
            f"extract.teacher.image_size={size} does not suit {family.model}: it must be a "
            f"multiple of {multiple}; {usual} is usual"
        )


def _set_size(config: Any, size: int, stride: int) -> None:
    """Set the sizes that transformers keeps in several places."""
    side = size // stride
    config.image_size = config.prompt_encoder_config.image_size = size
    vision = config.vision_config
    vision.backbone_feature_sizes = [[4 * side] * 2, [2 * side] * 2, [side] * 2]
    if hasattr(vision.backbone_config, "image_size"):
        vision.backbone_config.image_size = [size, size]
    config.memory_attention_rope_feat_sizes = [side, side]
