"""The networks of VBench's dimensions: finding, checking, loading.

DINO, CLIP and DINOv2 are transformers' classes, RAFT is torchvision's port of the original weights;
AMT-S and DreamSim, whose code no maintained library holds, come as TorchScript.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.files.hashes import sha256_of_file, sha256_of_folder
from stages.files.hub import hub_files
from stages.files.torchscript import check_torchscript, load_torchscript
from stages.files.weight_checks import check_weights, load_model, read_config, refuse_lfs_pointer
from stages.video_scores.vbench.config import VBenchConfig
from stages.video_scores.vbench.preprocess import (
    clip_input,
    dino_input,
    dinov2_input,
    dreamsim_input,
)

# Legend: B batch, C colour (RGB), H W pixels, D feature, N token.

Encoder = Callable[[Tensor], Tensor]
"""Features [B, D] of float32 frames [B, C, H, W], 0 to 255."""
PairNetwork = Callable[[Tensor, Tensor], Tensor]
"""What is computed from two float32 frames [B, C, H, W], 0 to 255: RAFT's flow [B, 2, H, W] from
the first to the second, pixels, for sides that are multiples of `FLOW_MULTIPLE`; or AMT's frame
between them, 0 to 1, for multiples of `INTERPOLATION_MULTIPLE`."""

MIN_SIDE = 128
"""Shortest side that RAFT and AMT-S can compute, pixels."""

FLOW_MULTIPLE, INTERPOLATION_MULTIPLE = 8, 16

_RAFT_UPDATES = 20
_README = "stages/evaluate/README.md says where to get it"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VBenchNetworks:
    """The networks that are there, on one device."""

    device: torch.device
    dino: Encoder | None = None
    clip: Encoder | None = None
    dinov2: Encoder | None = None
    dreamsim: Encoder | None = None
    """Called with one frame at a time."""
    flow: PairNetwork | None = None
    interpolate: PairNetwork | None = None
    """Called with one pair at a time."""
    sha256: str = ""
    """Hash of their files; empty without networks."""


NO_NETWORKS = VBenchNetworks(device=torch.device("cpu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Vision:
    """A network of transformers that describes images."""

    class_name: str
    hub_id: str
    patch_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """For `from_pretrained`."""


_VISION = {
    "dino": _Vision(
        class_name="ViTModel",
        hub_id="facebook/dino-vitb16",
        patch_size=16,
        # DINO's own code has no pooler, and 1e-6 where its conversion says 1e-12.
        options={"add_pooling_layer": False, "layer_norm_eps": 1e-6},
    ),
    "clip": _Vision(class_name="CLIPModel", hub_id="openai/clip-vit-base-patch32", patch_size=32),
    "dinov2": _Vision(class_name="Dinov2Model", hub_id="facebook/dinov2-base", patch_size=14),
}


class VBenchModels:
    """The networks that the settings name, checked; `load` loads their weights.

    Args:
        config: Paths and hub ids; hub ids are downloaded.
        device: Device to run on.

    Raises:
        ValueError: A network is missing, damaged or of another kind; or RAFT is named, and
            torchvision is not installed.
    """

    def __init__(self, config: VBenchConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._folders = {
            name: _find(name, given)
            for name in _VISION
            if (given := getattr(config, name)) is not None
        }
        # The others are small: they are checked by loading and running them.
        for name in _LOADERS:
            if getattr(config, name) is not None:
                self._load_small(name)

    def load(self) -> VBenchNetworks:
        """Load the weights."""
        encoders: dict[str, Any] = {
            name: _load_vision(name, folder, self._device) for name, folder in self._folders.items()
        }
        small: dict[str, Any] = {
            field_name: self._load_small(name)
            for name, (field_name, _) in _LOADERS.items()
            if getattr(self._config, name) is not None
        }
        return VBenchNetworks(
            device=self._device,
            sha256=self._sha256(),
            **encoders,
            **small,
        )

    def _sha256(self) -> str:
        files = {
            name: sha256_of_file(getattr(self._config, name).expanduser())
            for name in _LOADERS
            if getattr(self._config, name) is not None
        }
        folders = {name: sha256_of_folder(folder) for name, folder in self._folders.items()}
        if not files | folders:
            return ""
        return hashlib.sha256(json.dumps(files | folders, sort_keys=True).encode()).hexdigest()

    def _load_small(self, name: str) -> Any:
        """Load a network that is one file, and run it once."""
        path: Path = getattr(self._config, name).expanduser()
        frames_BCHW = torch.full((1, 3, MIN_SIDE, MIN_SIDE), 127.0, device=self._device)
        setting = f"evaluate.vbench.{name}"
        try:
            if not path.is_file():
                raise ValueError(f"there is no file {path}; {_README}")
            refuse_lfs_pointer(path)
            network = _LOADERS[name][1](path, self._device)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        try:
            with torch.inference_mode():
                found = network(frames_BCHW) if name == "dreamsim" else network(*2 * [frames_BCHW])
            shape = tuple(found.shape)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{setting}={path} cannot be run on {self._device} "
                f"({str(error).strip().splitlines()[-1]}); {_README}"
            ) from error
        if shape != _SHAPES.get(name, shape):
            raise ValueError(f"{setting}={path} gives {shape}, not {_SHAPES[name]}; {_README}")
        return network


def _find(name: str, given: str) -> Path:
    """The folder of DINO, CLIP or DINOv2, whose weights match its configuration."""
    local, vision = Path(given).expanduser(), _VISION[name]
    folder = local if local.is_dir() else _download(name, given)
    try:
        check_weights(_class_of(vision), folder, **vision.options)
    except ValueError as error:
        raise ValueError(f"evaluate.vbench.{name}={given}: {error}") from error
    config = read_config(folder / "config.json")
    patch_size = config.get("vision_config", config).get("patch_size")
    if patch_size != vision.patch_size:
        raise ValueError(
            f"evaluate.vbench.{name}={given} has patches of {patch_size} pixels, not of "
            f"{vision.patch_size}; {vision.hub_id} is VBench's"
        )
    return folder


def _download(name: str, given: str) -> Path:
    folder = hub_files(
        given,
        ["config.json", "*.safetensors"],
        named=f"evaluate.vbench.{name}={given}",
        remedy=f"{_VISION[name].hub_id} is VBench's",
    )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"evaluate.vbench.{name}={given} has no safetensors on the hub; "
            "stages/evaluate/README.md says how to convert it"
        )
    return folder


def _class_of(vision: _Vision) -> Any:
    import transformers

    return getattr(transformers, vision.class_name)


def _load_vision(name: str, folder: Path, device: torch.device) -> Encoder:
    vision = _VISION[name]
    model = load_model(_class_of(vision), folder, dtype=torch.float32, **vision.options)
    model = model.requires_grad_(False).eval().to(device)
    if name == "clip":
        return lambda frames_BCHW: model.get_image_features(clip_input(frames_BCHW)).pooler_output
    model.embeddings.interpolate_pos_encoding = _DinoPositions(model)
    if name == "dinov2":
        return lambda frames_BCHW: model(dinov2_input(frames_BCHW)).last_hidden_state[:, 0]
    return lambda frames_BCHW: model(
        dino_input(frames_BCHW), interpolate_pos_encoding=True
    ).last_hidden_state[:, 0]


class _DinoPositions:
    """Position embeddings of other sizes, as DINO's and DINOv2's own code interpolates them.

    It adds 0.1 to the number of patches (facebookresearch/dino at 7c446df, vision_transformer.py
    `interpolate_pos_encoding`; dinov2 at b8931f7 the same), which moves the positions by up to a
    tenth of a patch; transformers does not.
    """

    def __init__(self, model: Any) -> None:
        self._positions_1ND = model.embeddings.position_embeddings
        self._patch_size = model.config.patch_size

    def __call__(self, tokens_BND: Tensor, height: int, width: int) -> Tensor:
        positions_1ND = self._positions_1ND
        if tokens_BND.shape[1] == positions_1ND.shape[1] and height == width:
            return positions_1ND
        side = math.isqrt(positions_1ND.shape[1] - 1)
        grid_1DHW = positions_1ND[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scales = tuple((length // self._patch_size + 0.1) / side for length in (height, width))
        grid_1DHW = F.interpolate(grid_1DHW, scale_factor=scales, mode="bicubic")
        return torch.cat([positions_1ND[:, :1], grid_1DHW.flatten(2).mT], dim=1)


def _load_raft(path: Path, device: torch.device) -> PairNetwork:
    try:
        from torchvision.models.optical_flow import raft_large
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ValueError(
            f"RAFT needs torchvision ({str(error).splitlines()[0]}); install the build for torch "
            f"{torch.__version__}, or leave evaluate.vbench.raft null"
        ) from error
    model = raft_large(weights=None, progress=False)
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch has no class of its own for damaged files
        raise ValueError(
            f"{path} does not hold torchvision's weights of RAFT ({str(error).splitlines()[0]}); "
            f"{_README}"
        ) from error
    model = model.requires_grad_(False).eval().to(device)
    return lambda first_BCHW, second_BCHW: model(
        2 * (first_BCHW / 255) - 1, 2 * (second_BCHW / 255) - 1, num_flow_updates=_RAFT_UPDATES
    )[-1]


def _load_amt(path: Path, device: torch.device) -> PairNetwork:
    model = _load_torchscript(path, device)
    half_1111 = torch.full((1, 1, 1, 1), 0.5, device=device)
    return lambda first_BCHW, second_BCHW: model(first_BCHW / 255, second_BCHW / 255, half_1111)


def _load_dreamsim(path: Path, device: torch.device) -> Encoder:
    model = _load_torchscript(path, device)
    return lambda frames_BCHW: model(dreamsim_input(frames_BCHW)).reshape(len(frames_BCHW), -1)


def _load_torchscript(path: Path, device: torch.device) -> Any:
    remedy = "stages/evaluate/README.md says how to export it"
    check_torchscript(path, remedy=remedy)
    return load_torchscript(path, device, remedy=remedy)


_LOADERS: Mapping[str, tuple[str, Callable[[Path, torch.device], Any]]] = {
    "raft": ("flow", _load_raft),
    "amt": ("interpolate", _load_amt),
    "dreamsim": ("dreamsim", _load_dreamsim),
}
"""Field of `VBenchNetworks` and loader, by setting."""

_SHAPES = {"raft": (1, 2, MIN_SIDE, MIN_SIDE), "amt": (1, 3, MIN_SIDE, MIN_SIDE)}
"""What they give for a pair of frames of `MIN_SIDE`."""
