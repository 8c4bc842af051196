"""Configurations of a CogVideoX pipeline in a local folder or on the Hugging Face hub.

Values missing from a configuration file are filled in from the defaults of its diffusers class.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config import BaseModelConfig
from stages.files.weight_checks import read_config

VAE_SPATIAL_COMPRESSION = 8
"""Spatial compression of every CogVideoX VAE: pixels per latent in height and in width."""

OFS = 2.0
"""Value of the transformer's `ofs` input in the CogVideoX 1.5 image-to-video pipeline."""


COMPONENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tokenizer": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
    "text_encoder": ("transformers", ("T5EncoderModel",)),
    "vae": ("diffusers", ("AutoencoderKLCogVideoX",)),
    "transformer": ("diffusers", ("CogVideoXTransformer3DModel",)),
    "scheduler": ("diffusers", ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")),
}
"""Pipeline components: for each, the library that loads it and the accepted classes."""


def read_model_index(folder: Path) -> dict[str, Any]:
    """Read model_index.json and check that every component is of a supported class.

    Raises:
        ValueError: model_index.json is missing or damaged, or names an unsupported class.
    """
    file = folder / "model_index.json"
    index = read_config(file)
    for name, value in index.items():
        if name.startswith("_") or value == [None, None]:
            continue
        library, classes = COMPONENTS.get(name, ("", ()))
        if value not in [[library, one] for one in classes]:
            expected = " or ".join(f"{library}.{one}" for one in classes) or "no such component"
            raise ValueError(
                f"{file}: {name} is {value!r}, expected {expected}; model.path must be a CogVideoX "
                "pipeline of the official classes"
            )
    return index


@dataclass(frozen=True, kw_only=True, slots=True)
class CogVideoXConfigs:
    """Transformer, VAE and scheduler configs of a CogVideoX pipeline, with diffusers' keys."""

    folder: Path
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any] | None = None
    """Text encoder config, with transformers' keys; None if the folder has none."""

    @property
    def latent_channels(self) -> int:
        """Channels of the video latents."""
        return int(self.transformer["out_channels"])

    @property
    def image_to_video(self) -> bool:
        """Whether the transformer also takes the first frame's latents as input channels."""
        return bool(self.transformer["in_channels"] == 2 * self.transformer["out_channels"])

    @property
    def latent_scale(self) -> float:
        """Factor applied to VAE latents before the transformer."""
        return float(self.vae["scaling_factor"])

    @property
    def image_latent_scale(self) -> float:
        """Factor applied to the first frame's latents (image-to-video); inverted in 1.5."""
        scale = self.latent_scale
        return 1.0 / scale if self.vae["invert_scale_latents"] else scale

    @property
    def patch_size_t(self) -> int:
        """Latent frames per token: 1, or 2 in CogVideoX 1.5."""
        return int(self.transformer["patch_size_t"] or 1)

    @property
    def ofs(self) -> float | None:
        """Input of the offset embedding; None if the transformer has none."""
        return None if self.transformer["ofs_embed_dim"] is None else OFS

    def padding(self, num_latents: int) -> int:
        """Latent frames to prepend so that the clip's length is a multiple of `patch_size_t`."""
        return -num_latents % self.patch_size_t

    def token_grid(
        self, num_latents: int, latent_height: int, latent_width: int
    ) -> tuple[int, int, int]:
        """Tokens in time, height and width for a clip of this latent size, with padding."""
        patch = self.transformer["patch_size"]
        padded = num_latents + self.padding(num_latents)
        return padded // self.patch_size_t, latent_height // patch, latent_width // patch


BASE_CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
"""Files that `read_configs` requires; it reads `TEXT_ENCODER_CONFIG` too if present."""

TEXT_ENCODER_CONFIG = "text_encoder/config.json"


def read_configs(folder: Path) -> CogVideoXConfigs:
    """Read the configuration files of a diffusers pipeline folder.

    Raises:
        ValueError: a file is missing or invalid, or the folder is not a CogVideoX pipeline.
    """
    read_model_index(folder)
    text_encoder = folder / TEXT_ENCODER_CONFIG
    configs = CogVideoXConfigs(
        folder=folder,
        text_encoder=read_config(text_encoder) if text_encoder.is_file() else None,
        **{Path(name).parent.name: _read(folder / name) for name in BASE_CONFIGS},
    )
    channels = configs.transformer["in_channels"], configs.transformer["out_channels"]
    if channels[0] not in (channels[1], 2 * channels[1]):
        raise ValueError(
            f"the transformer in {folder} has {channels[0]} input and {channels[1]} output "
            "channels; CogVideoX has equally many (text-to-video) or twice as many input channels "
            "(image-to-video)"
        )
    return configs


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; the base model must be a CogVideoX pipeline in diffusers format"
        )
    # Imported late: it takes 2 s and 170 MB, and not every command needs a base model.
    import diffusers

    stored = read_config(path)
    name = stored.get("_class_name")
    if name not in COMPONENTS[path.parent.name][1]:
        raise ValueError(f"{path} describes a {name}; training supports only CogVideoX pipelines")
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    for key, default in defaults.items():
        if not _fits(stored.get(key, default), default):
            raise ValueError(
                f"{path}: {key} is {stored[key]!r}, expected a value such as {default!r}; download "
                "the model again"
            )
    return defaults | stored


def _fits(value: Any, default: Any) -> bool:
    """Whether a stored value has the type of the library's default."""
    if default is None or value is None:
        return True
    if isinstance(default, float):
        return type(value) in (int, float)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    return type(value) is type(default)


ALWAYS_PRESENT = "model_index.json"
"""The file by which a diffusers pipeline folder is recognised."""


def resolve_base_model(
    config: BaseModelConfig, subfolders: Sequence[str], *, download: bool = True
) -> Path:
    """Return the pipeline's folder; for a hub id, download only the requested components.

    Args:
        config: The base model: a folder (used as is) or a hub id.
        subfolders: Required components, such as `vae` or `text_encoder`, or single files, such as
            `transformer/config.json`.
        download: Download files that are missing from the local hub cache.

    Returns:
        A folder with `model_index.json` and every requested component.

    Raises:
        ValueError: A component is missing, or the hub id cannot be downloaded.
    """
    if config.is_local:
        folder = Path(config.path).expanduser()
    else:
        folder = _download(config, subfolders, local_files_only=not download)
    missing = [part for part in (ALWAYS_PRESENT, *subfolders) if not (folder / part).exists()]
    if missing:
        raise ValueError(
            f"the base model {config.path} has no {', '.join(missing)}; model.path must be a "
            "diffusers pipeline folder of CogVideoX (model_index.json, tokenizer/, text_encoder/, "
            "vae/, transformer/, scheduler/) or its hub id, such as zai-org/CogVideoX-5b"
        )
    return folder


def _download(
    config: BaseModelConfig, subfolders: Sequence[str], *, local_files_only: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [ALWAYS_PRESENT]
    for part in subfolders:
        patterns += [part, f"{part}/*"]
    try:
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision,
                allow_patterns=patterns,
                local_files_only=local_files_only,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"the base model {config.path!r} is not a local folder, and it could not be downloaded "
            f"as a hub id ({error}); set model.path to a diffusers pipeline folder, or download "
            f"one first: hf download {config.path} --local-dir "
            f"checkpoints/{Path(config.path).name}"
        ) from error
