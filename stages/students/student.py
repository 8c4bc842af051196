"""The interface of a student: all that the stages ask of a family of base models.

A family is one folder of this package. Its `StudentConfigs` reads a base model's configurations and
answers what depends on the family: shapes, text, latents, noising and target, the transformer's
inputs, sampling, names in LoRA files. Everything else is written once for all students.

Legend: B clip, F latent frame, C channel, H W latent, L text token, D width, T frame.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import ClipsConfig
from stages.config import Expert, SchedulerName

VAE_SPATIAL_COMPRESSION = 8
"""Spatial compression of every supported VAE: pixels per latent in height and in width."""

VAE_TEMPORAL_COMPRESSION = 4
"""Temporal compression of every supported VAE: frames per latent frame after the first."""

FirstFrameEncoder = Callable[[Tensor, str], dict[str, np.ndarray]]
"""Stored arrays of an image-to-video condition from a clip's pixels_BCTHW (-1 to 1) and its key."""


def transformer_part(expert: Expert | None) -> Literal["transformer", "transformer_2"]:
    """Folder of a transformer in a pipeline."""
    return "transformer_2" if expert == "low-noise" else "transformer"


class Condition(NamedTuple):
    """What an image-to-video model is given of a clip's first frame."""

    channels_FCHW: Tensor
    """Further input channels of the transformer, float32."""
    embeds_LD: Tensor | None
    """States of an image encoder, as stored; None if the model takes none."""


class NoiseSchedule(Protocol):
    """Noise and prediction target of training, at integer timesteps of the schedule.

    Timesteps are positions in the schedule, 0 the least noise; training draws them uniformly from
    `StudentConfigs.trained_timesteps`.
    """

    def signal(self, timestep_B: Tensor) -> Tensor:
        """Share of the signal in the power of the noisy latents: float32 [B], 1 without noise."""

    def noisy_latents(self, clean_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """Add the noise of a timestep to scaled latents."""

    def diffusion_loss(
        self, predicted_BFCHW: Tensor, clean_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor
    ) -> Tensor:
        """Loss of each clip, float32 [B]."""

    def model_timestep(self, timestep_B: Tensor) -> Tensor:
        """What the transformer receives as its timestep: [B]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfigs(ABC):
    """Configurations of a base model with diffusers' keys, and what depends on its family."""

    folder: Path
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any] | None = None
    """Text encoder config, with transformers' keys; None if the folder has none."""
    boundary_ratio: float | None = None
    """Share of the timesteps from which the first of two transformers denoises, the second below
    it; None if the model has one transformer."""
    expert: Expert | None = None
    """Which of two transformers `transformer` configures and training uses; None if the model has
    one, or where it does not matter."""

    FAMILY: ClassVar[str]
    """Name for messages."""
    HUB_EXAMPLE: ClassVar[str]
    """An official model's hub id."""
    COMPONENTS: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]]
    """Pipeline components: for each, the library that loads it and the accepted classes."""
    INDEX_OPTIONS: ClassVar[frozenset[str]] = frozenset()
    """Entries of model_index.json that are no components."""
    PIPELINES: ClassVar[Mapping[str, bool]]
    """Supported pipeline classes, the first for text-to-video, and whether they take an image."""
    BLOCKS: ClassVar[str]
    """Attribute of the transformer that holds its blocks; their image tokens are the output, or the
    first of a tuple."""
    FLOAT32_PARTS: ClassVar[frozenset[str]] = frozenset()
    """Components that sample in float32 whatever the precision of the others."""
    DEFAULT_FPS: ClassVar[float]
    """Frames per second that the models were trained at, used if `data.fps` is null."""

    @classmethod
    def model_class(cls, part: str, name: str | None = None) -> Any:
        """The diffusers or transformers class of a component.

        Args:
            part: the component.
            name: one of the accepted classes; None takes the first.
        """
        library, classes = cls.COMPONENTS[part]
        return getattr(importlib.import_module(library), name or classes[0])

    @classmethod
    def check_index(cls, file: Path, index: Mapping[str, Any]) -> None:
        """Reject a model_index.json whose values this family does not support (`ValueError`)."""
        return

    @abstractmethod
    def check(self) -> None:
        """Reject configurations that are not of a supported model of the family (`ValueError`)."""

    # Shapes.

    @property
    def latent_channels(self) -> int:
        """Channels of the video latents."""
        return int(self.transformer["out_channels"])

    @property
    def width(self) -> int:
        """Channels of the transformer's tokens."""
        heads: int = self.transformer["num_attention_heads"]
        return heads * int(self.transformer["attention_head_dim"])

    @property
    def num_blocks(self) -> int:
        """Number of the transformer's blocks."""
        return int(self.transformer["num_layers"])

    @property
    def timesteps(self) -> int:
        """Number of timesteps of the schedule."""
        return int(self.scheduler["num_train_timesteps"])

    @property
    def trained_timesteps(self) -> range:
        """Timesteps that training draws from: the whole schedule, or the expert's part of it."""
        return range(self.timesteps)

    @property
    def transformer_part(self) -> Literal["transformer", "transformer_2"]:
        """Folder of the transformer that training uses."""
        return transformer_part(self.expert)

    @property
    @abstractmethod
    def image_to_video(self) -> bool:
        """Whether the transformer also takes the first frame."""

    @property
    @abstractmethod
    def condition_channels(self) -> int:
        """Input channels of the transformer beyond the noisy latents; 0 for text-to-video."""

    @property
    @abstractmethod
    def image_embeds_shape(self) -> tuple[int, int] | None:
        """Length and width of the image encoder's states; None if the model takes none."""

    @property
    @abstractmethod
    def text_shape(self) -> tuple[int, int]:
        """Length and width of the text embeddings."""

    @property
    @abstractmethod
    def patch_size_t(self) -> int:
        """Latent frames per token."""

    def padding(self, num_latents: int) -> int:
        """Latent frames to prepend so that the clip's length is a multiple of `patch_size_t`."""
        return -num_latents % self.patch_size_t

    @abstractmethod
    def token_grid(
        self, num_latents: int, latent_height: int, latent_width: int
    ) -> tuple[int, int, int]:
        """Tokens in time, height and width for a clip of this latent size, with padding."""

    # Stage one: text and latents.

    @abstractmethod
    def text_settings(self) -> dict[str, JSON]:
        """What identifies the text encoder in a store's settings, besides its files."""

    @abstractmethod
    def embed_caption(self, tokenizer: Any, encoder: Any, caption: str) -> tuple[Tensor, int]:
        """Encode a caption as the family's pipelines do.

        Returns:
            embeds_LD of `text_shape`, and the number of tokens of the whole caption.
        """

    @abstractmethod
    def latents_settings(self) -> dict[str, JSON]:
        """What identifies the VAE in a store's settings, besides its files."""

    @abstractmethod
    def check_vae(self) -> None:
        """Reject a VAE whose compression in time and space is not the clips' (`ValueError`)."""

    @abstractmethod
    def check_latents(self, base: Mapping[str, Any]) -> str | None:
        """Why latents cannot be trained on: what differs from this model; None if nothing does.

        Args:
            base: settings of the VAE that made them, from the store.
        """

    @abstractmethod
    def check_text(self, base: Mapping[str, Any]) -> str | None:
        """As `check_latents`, for the text encoder."""

    @abstractmethod
    def first_frame_settings(self, *, seed: int, draws: int) -> dict[str, JSON]:
        """Store settings of the image-to-video condition; empty for text-to-video.

        Args:
            seed: seed of the noise on first frames.
            draws: noisy draws per first frame, for a family that is trained with them.
        """

    @abstractmethod
    def first_frame_arrays(self, clips: ClipsConfig, *, draws: int) -> dict[str, ArraySpec]:
        """Array specs of a clip's image-to-video condition; empty for text-to-video."""

    @abstractmethod
    def first_frame_encoder(
        self, vae: Any, device: torch.device, *, seed: int, draws: int
    ) -> FirstFrameEncoder:
        """Load what encodes first frames besides the VAE; for image-to-video models only."""

    @abstractmethod
    def run_first_frame(self, vae: Any, pixels_BCTHW: Tensor, *, draws: int) -> None:
        """The VAE's passes of a `FirstFrameEncoder`, for counting their cost on the meta device."""

    # Stage two: inputs, noise and target.

    @abstractmethod
    def scale_latents(self, latents_FCHW: Tensor) -> Tensor:
        """From the VAE's latents to those that the transformer denoises."""

    @abstractmethod
    def pad_in_front(self, latents_FCHW: Tensor) -> Tensor:
        """Prepend `padding` latent frames."""

    @abstractmethod
    def condition(
        self, stored: Mapping[str, Tensor], num_latents: int, generator: torch.Generator
    ) -> Condition:
        """The first frame as the transformer takes it, from the stored arrays of a clip.

        Args:
            stored: arrays of the latents store; those of `first_frame_arrays` are read.
            num_latents: latent frames, padding included.
            generator: for what is drawn anew each time.
        """

    @abstractmethod
    def check_condition(self, latents: StoreSettings, clips: ClipsConfig) -> str | None:
        """What a latents store with the arrays of `first_frame_arrays` does wrong; None if nothing.

        Args:
            latents: settings of the store.
            clips: size of the clips.
        """

    @abstractmethod
    def schedule(self, device: torch.device) -> NoiseSchedule:
        """The noise schedule of training.

        Raises:
            ValueError: the scheduler is not one that the family's models were trained with.
        """

    @abstractmethod
    def shape_inputs(
        self, num_latents: int, latent_height: int, latent_width: int, device: torch.device
    ) -> dict[str, Any]:
        """Keyword arguments of the transformer that depend only on the shape of a batch."""

    @abstractmethod
    def transformer_inputs(
        self,
        latents_BFCHW: Tensor,
        text_BLD: Tensor,
        timestep_B: Tensor,
        image_BLD: Tensor | None = None,
    ) -> dict[str, Any]:
        """The transformer's other keyword arguments.

        Args:
            latents_BFCHW: noisy latents, with the condition's channels.
            text_BLD: text embeddings.
            timestep_B: of `NoiseSchedule.model_timestep`.
            image_BLD: states of the image encoder, if the model takes them.
        """

    @abstractmethod
    def prediction(self, output: Tensor) -> Tensor:
        """The transformer's output as predicted_BFCHW."""

    def check_training_size(self, clips: ClipsConfig) -> None:
        """Reject a clip size that the transformer cannot be trained at (`ValueError`)."""
        return

    # Sampling.

    def check_video_size(self, clips: ClipsConfig) -> None:
        """Reject a size that the pipeline cannot generate (`ValueError`)."""
        return

    def check_sampling(self, *, scheduler: SchedulerName, dynamic_cfg: bool) -> None:
        """Reject settings of sampling that the family does not have (`ValueError`)."""
        return

    @classmethod
    @abstractmethod
    def sampling_arguments(cls, pipeline: Any, *, dynamic_cfg: bool) -> dict[str, Any]:
        """Arguments of the pipeline's call that only this family takes."""

    @classmethod
    def set_scheduler(cls, pipeline: Any, name: SchedulerName) -> None:
        """Choose a pipeline's sampler; `model` leaves its own."""
        assert name == "model", "checked by check_sampling"

    # LoRA.

    @classmethod
    @abstractmethod
    def lora_layer_name(cls, module: str, form: str) -> str:
        """Name of a module in a LoRA file of the form comfyui or kohya, with its prefix.

        Args:
            module: name in diffusers' transformer, such as `….attn1.to_q`.
            form: key format.
        """
