"""Builds SAM2 from an official configuration and checkpoint; the one file that imports sam2.

`two_way_tracking` drives what is built here; the demo builds its tiny SAM2 here too.
"""

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sam2
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sam2.modeling.sam2_base import SAM2Base
from yaml import YAMLError

_CONFIGS = Path(sam2.__path__[0]) / "configs"
_OFFICIAL_FOLDERS = ("sam2", "sam2.1")
_BACKBONE_STRIDE = 16

_PREDICTOR_SETTINGS: Mapping[str, Any] = {
    "binarize_mask_from_pts_for_mem_enc": True,
    "sam_mask_decoder_extra_args": {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    },
}
"""What sam2.build_sam.build_sam2_video_predictor adds to a configuration by default, save for the
filling of holes in its output masks (fill_hole_area), which would change the tracked masks only
where a CUDA extension happens to be installed."""


def official_configs() -> dict[str, Path]:
    """Official configurations by name: sam2.1_hiera_l -> its YAML file in the sam2 package."""
    files = (file for folder in _OFFICIAL_FOLDERS for file in (_CONFIGS / folder).glob("*.yaml"))
    return {file.stem: file for file in sorted(files)}


def load_sam2_config(config: str | Path, *, image_size: int | None = None) -> dict[str, Any]:
    """Read a configuration and fit it to the image size and to video.

    Args:
        config: Name of an official configuration, or a YAML file in their format.
        image_size: Side in pixels of the square SAM2 sees; None keeps the file's own. The rotary
            position grids of the memory attention are fitted to it.

    Returns:
        The resolved tree under the file's `model` key: everything that shapes the arithmetic apart
        from the weights.

    Raises:
        ValueError: No such configuration, or the file is not one.
    """
    file = _config_file(config)
    try:
        document = OmegaConf.load(file)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"the SAM2 configuration {file} is not valid YAML: {error}") from error
    model = document.get("model") if isinstance(document, DictConfig) else None
    if not isinstance(model, DictConfig):
        raise ValueError(
            f"the SAM2 configuration {file} has no `model` section; "
            "it must look like the YAML files of the sam2 package"
        )
    for target in _targets(OmegaConf.to_container(model)):
        if not target.startswith("sam2."):
            raise ValueError(
                f"the SAM2 configuration {file} builds {target}, which is not part of sam2; "
                "inference configurations name sam2 classes only (training ones do not fit)"
            )
    try:
        model.merge_with(_PREDICTOR_SETTINGS)
        if image_size is not None:
            model.image_size = image_size
        side = model.image_size // model.get("backbone_stride", _BACKBONE_STRIDE)
        for attention in ("self_attention", "cross_attention"):
            model.memory_attention.layer[attention].feat_sizes = [side, side]
        tree = OmegaConf.to_container(model, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"the SAM2 configuration {file} is incomplete: {error}") from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def build_sam2(
    config: str | Path,
    checkpoint: Path | None,
    *,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> SAM2Base:
    """Build SAM2 and load its weights.

    The result equals `sam2.build_sam.build_sam2_video_predictor` with `fill_hole_area=0`.

    Args:
        config: Name of an official configuration such as sam2.1_hiera_l, or a YAML file.
        checkpoint: An official checkpoint, {"model": state dict}; None leaves random weights.
        image_size: Side in pixels of the square SAM2 sees, a multiple of 32; None keeps the
            configuration's.
        device: Where the model goes.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ValueError: The configuration is unknown, or the checkpoint is unreadable or made for
            another configuration; the message names the one it fits.
    """
    weights = None if checkpoint is None else read_checkpoint(checkpoint)
    try:
        model = instantiate(load_sam2_config(config, image_size=image_size), _recursive_=True)
    except InstantiationException as error:
        raise ValueError(f"the SAM2 configuration {config} cannot be built: {error}") from error
    if not isinstance(model, SAM2Base):
        raise ValueError(
            f"the SAM2 configuration {config} builds a {type(model).__name__}; "
            "its model._target_ must be sam2.modeling.sam2_base.SAM2Base"
        )
    if weights is not None:
        assert checkpoint is not None
        _check_fit(model.state_dict(), weights, config=config, checkpoint=checkpoint)
        model.load_state_dict(weights)
    return model.requires_grad_(False).eval().to(device)


def read_checkpoint(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the state dict of an official checkpoint without running any code in it.

    Raises:
        ValueError: The file is missing, unreadable, or not {"model": state dict}.
    """
    if not checkpoint.is_file():
        raise ValueError(
            f"no SAM2 checkpoint at {checkpoint}; download sam2.1_hiera_large.pt from "
            "https://github.com/facebookresearch/sam2 and set extract.teacher.checkpoint"
        )
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


@dataclass(frozen=True, slots=True)
class _Architecture:
    """The few facts that tell the official models apart."""

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
        # The defaults of sam2's Hiera, which sam2_hiera_b+.yaml leaves out in part.
        return cls(
            trunk.get("embed_dim", 96),
            sum(trunk.get("stages", (2, 3, 16, 3))),
            bool(config.get("no_obj_embed_spatial", False)),
        )


def _check_fit(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    *,
    config: str | Path,
    checkpoint: Path,
) -> None:
    """Compare names and shapes; on a difference, say which official configuration would fit."""
    differences = [
        f"{key} is {_shape(found, key)}, expected {_shape(expected, key)}"
        for key in sorted({*expected, *found})
        if _shape(expected, key) != _shape(found, key)
    ]
    if not differences:
        return
    architecture = _Architecture.of_weights(found)
    fitting = [
        name
        for name in official_configs()
        if architecture == _Architecture.of_config(load_sam2_config(name))
    ]
    advice = (
        f"it fits {fitting[0]}: set extract.teacher.config={fitting[0]}"
        if fitting
        else "it fits none of the official configurations: give the YAML file it was trained with"
    )
    raise ValueError(
        f"the checkpoint {checkpoint} does not fit the SAM2 configuration {config} "
        f"({len(differences)} tensors differ; {differences[0]}); {advice}"
    )


def _shape(weights: Mapping[str, torch.Tensor], key: str) -> str:
    return str(list(weights[key].shape)) if key in weights else "absent"


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


def _targets(tree: Any) -> Iterator[str]:
    """Every class that a configuration tree would build."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "_target_":
                yield str(value)
            else:
                yield from _targets(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _targets(value)
