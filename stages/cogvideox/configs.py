"""Configurations of a CogVideoX pipeline, found in a local folder or on the hub.

Values that a configuration file omits come from the defaults of the diffusers class that reads it.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config import BaseModelConfig
from stages.files.weight_checks import read_config

VAE_SPATIAL_COMPRESSION = 8
"""Pixels per latent, in height and width, of every CogVideoX VAE."""

OFS = 2.0
"""The value that CogVideoX 1.5's image-to-video pipeline always gives its transformer as `ofs`."""


COMPONENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tokenizer": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
    "text_encoder": ("transformers", ("T5EncoderModel",)),
    "vae": ("diffusers", ("AutoencoderKLCogVideoX",)),
    "transformer": ("diffusers", ("CogVideoXTransformer3DModel",)),
    "scheduler": ("diffusers", ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")),
}
"""Parts of a pipeline: the library that each is loaded by, and the classes that it may be of."""


def read_model_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of its parts, all of classes that this project loads.

    Raises:
        ValueError: model_index.json is missing or damaged, or names another class.
    """
    file = folder / "model_index.json"
    index = read_config(file)
    for name, value in index.items():
        if name.startswith("_") or value == [None, None]:
            continue
        library, classes = COMPONENTS.get(name, ("", ()))
        if value not in [[library, one] for one in classes]:
            expected = " or ".join(f"{library}.{one}" for one in classes) or "no such part"
            raise ValueError(
                f"{file}: {name} is {value!r}, expected {expected}; model.path must be a CogVideoX "
                "pipeline of the official classes"
            )
    return index


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """Settings of a pipeline's transformer, VAE and scheduler, as diffusers names them."""

    folder: Path
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any] | None = None
    """As transformers names them; None where the folder has none."""

    @property
    def latent_channels(self) -> int:
        """Channels of the video's latents."""
        return int(self.transformer["out_channels"])

    @property
    def image_to_video(self) -> bool:
        """Whether the transformer also takes the first frame's latents, beside the video's."""
        return bool(self.transformer["in_channels"] == 2 * self.transformer["out_channels"])

    @property
    def latent_scale(self) -> float:
        """What a VAE latent is multiplied by before the transformer sees it."""
        return float(self.vae["scaling_factor"])

    @property
    def image_latent_scale(self) -> float:
        """The same for image-to-video's first frame; 1.5 divides where 1.0 multiplies."""
        scale = self.latent_scale
        return 1.0 / scale if self.vae["invert_scale_latents"] else scale

    @property
    def patch_size_t(self) -> int:
        """Latent frames per token: 1, or 2 in CogVideoX 1.5."""
        return int(self.transformer["patch_size_t"] or 1)

    @property
    def ofs(self) -> float | None:
        """Offset embedding's input, or None where the transformer has none."""
        return None if self.transformer["ofs_embed_dim"] is None else OFS

    def padding(self, num_latents: int) -> int:
        """Latent frames put before the clip so that its length divides by `patch_size_t`."""
        return -num_latents % self.patch_size_t

    def token_grid(
        self, num_latents: int, latent_height: int, latent_width: int
    ) -> tuple[int, int, int]:
        """Tokens in time, height and width for a clip of this many latents, padding included."""
        patch = self.transformer["patch_size"]
        padded = num_latents + self.padding(num_latents)
        return padded // self.patch_size_t, latent_height // patch, latent_width // patch


BASE_CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
"""What `read_base_facts` reads of a pipeline folder, and the text encoder's if it is there."""

TEXT_ENCODER_CONFIG = "text_encoder/config.json"


def read_base_facts(folder: Path) -> BaseFacts:
    """Read the configuration files of a diffusers pipeline folder.

    Raises:
        ValueError: a file is missing, or the folder holds no CogVideoX.
    """
    read_model_index(folder)
    text_encoder = folder / TEXT_ENCODER_CONFIG
    facts = BaseFacts(
        folder=folder,
        text_encoder=read_config(text_encoder) if text_encoder.is_file() else None,
        **{Path(name).parent.name: _read(folder / name) for name in BASE_CONFIGS},
    )
    channels = facts.transformer["in_channels"], facts.transformer["out_channels"]
    if channels[0] not in (channels[1], 2 * channels[1]):
        raise ValueError(
            f"the transformer in {folder} has {channels[0]} input and {channels[1]} output "
            "channels; a CogVideoX has as many (text-to-video) or twice as many (image-to-video)"
        )
    return facts


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; the base model must be a CogVideoX pipeline as diffusers saves it"
        )
    # Takes 2 s and 170 MB, which kinds that need no base model do without.
    import diffusers

    stored = read_config(path)
    name = stored.get("_class_name")
    if name not in COMPONENTS[path.parent.name][1]:
        raise ValueError(f"{path} describes a {name}; training supports CogVideoX pipelines alone")
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
    """Whether a stored value is of the kind that the library's default is of."""
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
    """Return the folder of the pipeline, downloading only what is asked for when it is a hub id.

    Args:
        config: The base model: a folder (used as it is) or a hub id.
        subfolders: Parts that must be there, such as `vae` or `text_encoder`; a file such as
            `transformer/config.json` is a part too.
        download: Fetch what the hub's cache on this machine lacks.

    Returns:
        A folder that holds `model_index.json` and every part.

    Raises:
        ValueError: The folder lacks a part, or the hub id cannot be downloaded.
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
            f"the base model {config.path!r} is not a folder here, and it could not be downloaded "
            f"as a hub id ({error}); set model.path to a diffusers pipeline folder, or fetch one "
            f"first: hf download {config.path} --local-dir checkpoints/{Path(config.path).name}"
        ) from error
