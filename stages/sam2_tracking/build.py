"""Build SAM2 from an official configuration and checkpoint. No other file imports sam2."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import sam2
import torch
from accelerate import init_empty_weights
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import SAM2Base

from stages.files.yaml import YamlError, read_yaml
from stages.sam2_tracking.checkpoints import (
    differences,
    download_checkpoint,
    find_matching_config,
    read_checkpoint,
)
from stages.sam2_tracking.encoder_memory import reduce_encoder_memory
from stages.sam2_tracking.model import TrackerSpec

_CONFIGS = Path(sam2.__path__[0]) / "configs"
_OFFICIAL_FOLDERS = ("sam2", "sam2.1")
_BACKBONE_STRIDE = 16
_IMAGE_MULTIPLE = 32

_CLASSES: Mapping[str, type[torch.nn.Module]] = {
    f"{one.__module__}.{one.__qualname__}": one
    for one in (
        *(SAM2Base, ImageEncoder, Hiera, FpnNeck, PositionEmbeddingSine, RoPEAttention),
        *(MemoryAttention, MemoryAttentionLayer, MemoryEncoder, MaskDownSampler, Fuser, CXBlock),
    )
}
"""Classes that a configuration may instantiate: those of the official inference configurations.
Names are looked up here and never imported, since the file may come from an untrusted source."""

_TARGET = "_target_"

_PREDICTOR_SETTINGS: dict[str, Any] = {
    "binarize_mask_from_pts_for_mem_enc": True,
    "sam_mask_decoder_extra_args": {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    },
}
"""Overrides that sam2.build_sam.build_sam2_video_predictor applies by default, except for
fill_hole_area: it changes the tracked masks only where sam2's CUDA extension is installed."""


HUB_CHECKPOINTS: Mapping[str, tuple[str, str]] = {
    hub_id: (Path(config).stem, file) for hub_id, (config, file) in HF_MODEL_ID_TO_FILENAMES.items()
}
"""Official checkpoints by hub id: configuration name and file name in the repository."""


def official_configs() -> dict[str, Path]:
    """Return the official configurations: sam2.1_hiera_l -> its YAML file in the sam2 package."""
    files = (file for folder in _OFFICIAL_FOLDERS for file in (_CONFIGS / folder).glob("*.yaml"))
    return {file.stem: file for file in sorted(files)}


def find_checkpoint(name: str, *, download: bool = True) -> Path:
    """Return the path of a checkpoint given by path or by the hub id of an official one.

    Args:
        name: A path on this machine, or an id such as facebook/sam2.1-hiera-large.
        download: Download an official checkpoint that is not in the hub cache.

    Raises:
        ValueError: `name` is neither, or the download fails.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in HUB_CHECKPOINTS:
        _, file = HUB_CHECKPOINTS[name]
        return download_checkpoint(name, file, local_files_only=not download)
    raise ValueError(
        f"extract.teacher.checkpoint={name} is "
        + (
            "a folder: name the .pt or .safetensors file in it; a folder in transformers' format "
            "has a config.json"
            if path.is_dir()
            else "not a file on this machine"
        )
        + "; give the path of a SAM2 checkpoint or of a folder in transformers' format, or the hub "
        "id of an official SAM2: " + ", ".join(HUB_CHECKPOINTS)
    )


def load_sam2_config(config: str | Path, *, image_size: int | None = None) -> dict[str, Any]:
    """Read a configuration and set it up for video and for the image size.

    Args:
        config: Name of an official configuration, or a YAML file in the same format.
        image_size: Side in pixels of SAM2's square input; None keeps the file's value. The rotary
            position grids of the memory attention are set to match.

    Returns:
        The resolved tree under the file's `model` key: everything that determines the outputs
        apart from the weights.

    Raises:
        ValueError: The configuration does not exist or is not valid.
    """
    file = _config_file(config)
    where = f"the SAM2 configuration {file}"
    try:
        document = read_yaml(file)
    except YamlError as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from error
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise ValueError(
            f"{where} has no `model` section; it must look like the YAML files of the sam2 package"
        )
    if "defaults" in document:
        raise ValueError(
            f"{where} has a `defaults` list, which is not supported: give the composed file"
        )
    _check_tree(model, "model", where)
    model |= _PREDICTOR_SETTINGS | {
        "sam_mask_decoder_extra_args": {
            **(model.get("sam_mask_decoder_extra_args") or {}),
            **_PREDICTOR_SETTINGS["sam_mask_decoder_extra_args"],
        }
    }
    if image_size is not None and image_size % _IMAGE_MULTIPLE:
        raise ValueError(
            f"extract.teacher.image_size={image_size} does not suit SAM2: it must be a multiple of "
            f"{_IMAGE_MULTIPLE}; 1024 is usual"
        )
    try:
        if image_size is not None:
            model["image_size"] = image_size
        side = model["image_size"] // model.get("backbone_stride", _BACKBONE_STRIDE)
        for attention in ("self_attention", "cross_attention"):
            model["memory_attention"]["layer"][attention]["feat_sizes"] = [side, side]
    except KeyError as error:
        raise ValueError(f"{where} is incomplete: it has no {error}") from error
    except TypeError as error:
        raise ValueError(f"{where} is not a SAM2 configuration: {error}") from error
    return model


def _check_tree(node: Any, path: str, where: str) -> None:
    """Raise ValueError for anything other than plain values and official classes."""
    if isinstance(node, list):
        for number, item in enumerate(node):
            _check_tree(item, f"{path}[{number}]", where)
    elif isinstance(node, str) and "${" in node:
        raise ValueError(
            f"{where}: {path} is {node!r}; references are not supported, write the value itself"
        )
    elif isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str) or (key.startswith("_") and key != _TARGET):
                raise ValueError(f"{where}: {path} has the key {key!r}, which is not supported")
            if key == _TARGET and (not isinstance(value, str) or value not in _CLASSES):
                raise ValueError(
                    f"{where}: {path} builds {value}; only the classes of sam2's inference "
                    f"configurations are built ({', '.join(_CLASSES)})"
                )
            if key == "weights_path" and value is not None:
                raise ValueError(
                    f"{where}: {path}.weights_path loads a file; give it null, and name the "
                    "weights of the whole model as extract.teacher.checkpoint"
                )
            _check_tree(value, f"{path}.{key}", where)


def check_sam2(
    config: str | Path | None, checkpoint: Path, *, image_size: int | None = None
) -> TrackerSpec:
    """Check that a configuration and a checkpoint match, without loading the model.

    Args:
        config: Name of an official configuration, a YAML file, or None for the official one that
            matches the checkpoint.
        checkpoint: See `checkpoints.read_checkpoint`.
        image_size: Side in pixels of SAM2's square input; None keeps the configuration's.

    Raises:
        ValueError: See `build_sam2`.
    """
    name, model, _ = _load_checked(config, checkpoint, image_size)
    return TrackerSpec(
        library="sam2",
        config=load_sam2_config(name, image_size=image_size),
        config_name=name,
        hidden_dim=model.hidden_dim,
        mem_dim=model.mem_dim,
        stride=model.backbone_stride,
    )


def build_sam2(
    config: str | Path | None,
    checkpoint: Path | None,
    *,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> SAM2Base:
    """Build SAM2 and load its weights.

    The result equals `sam2.build_sam.build_sam2_video_predictor` with `fill_hole_area=0`.

    Args:
        config: Name of an official configuration such as sam2.1_hiera_l, a YAML file, or None for
            the official one that matches the checkpoint.
        checkpoint: See `checkpoints.read_checkpoint`; None keeps random weights.
        image_size: Side in pixels of SAM2's square input, a multiple of 32; None keeps the
            configuration's.
        device: Device of the model; meta builds it without values, for its shapes.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ValueError: The configuration is unknown, or the checkpoint is unreadable or made for
            another configuration; the message names the one it fits.
    """
    if checkpoint is None:
        if config is None:
            raise ValueError("neither a SAM2 configuration nor a checkpoint is given")
        with init_empty_weights() if torch.device(device).type == "meta" else nullcontext():
            model = _instantiate(config, image_size)
    else:
        _, model, weights = _load_checked(config, checkpoint, image_size)
        expected = model.state_dict()
        # Copied, so that the model does not depend on the mapped file; directly to the device, so
        # that the host never holds a full copy.
        copies = {
            key: value.to(device, expected[key].dtype, copy=True) for key, value in weights.items()
        }
        model.load_state_dict(copies, assign=True)
    reduce_encoder_memory(model)
    return model.requires_grad_(False).eval().to(device)


def _load_checked(
    config: str | Path | None, checkpoint: Path, image_size: int | None
) -> tuple[str, SAM2Base, dict[str, torch.Tensor]]:
    """Return the configuration's name, the model on the meta device, and matching weights."""
    weights = read_checkpoint(checkpoint)
    if config is None:
        config = _matching_config(weights)
        if config is None:
            raise ValueError(
                f"the checkpoint {checkpoint} fits none of the official SAM2 configurations: set "
                "extract.teacher.config to the YAML file it was trained with"
            )
    with init_empty_weights():
        model = _instantiate(config, image_size)
    different = differences(model.state_dict(), weights)
    if different:
        matching = _matching_config(weights)
        advice = (
            f"it fits {matching}: set extract.teacher.config={matching}"
            if matching is not None and matching != str(config)
            else "it fits none of the official configurations: give the YAML file it was trained "
            "with"
        )
        raise ValueError(
            f"the checkpoint {checkpoint} does not fit the SAM2 configuration {config} "
            f"({len(different)} tensors differ; {different[0]}); {advice}"
        )
    return str(config), model, weights


def _matching_config(weights: Mapping[str, torch.Tensor]) -> str | None:
    return find_matching_config(
        weights, {name: load_sam2_config(name) for name in official_configs()}
    )


def _instantiate(config: str | Path, image_size: int | None) -> SAM2Base:
    tree = load_sam2_config(config, image_size=image_size)
    try:
        model = _build_tree(tree)
    except Exception as error:  # constructors raise anything on wrong arguments
        raise ValueError(f"the SAM2 configuration {config} cannot be built: {error}") from error
    if not isinstance(model, SAM2Base):
        raise ValueError(
            f"the SAM2 configuration {config} builds a {type(model).__name__}; "
            "its model._target_ must be sam2.modeling.sam2_base.SAM2Base"
        )
    return model


def _build_tree(node: Any) -> Any:
    """Replace every mapping that names a class by an instance of it, innermost first."""
    if isinstance(node, list):
        return [_build_tree(item) for item in node]
    if not isinstance(node, dict):
        return node
    values = {key: _build_tree(value) for key, value in node.items() if key != _TARGET}
    if _TARGET not in node:
        return values
    try:
        return _CLASSES[node[_TARGET]](**values)
    except TypeError as error:
        raise TypeError(f"{node[_TARGET]}: {error}") from error


def _config_file(config: str | Path) -> Path:
    official = official_configs()
    if str(config) in official:
        return official[str(config)]
    file = Path(config).expanduser()
    if file.is_file():
        return file
    raise ValueError(
        f"{config!s} is neither an official SAM2 configuration ({', '.join(official)}) "
        "nor a YAML file; sam2.1_hiera_l goes with sam2.1_hiera_large.pt"
    )
