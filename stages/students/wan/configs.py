"""Wan 2.1 and Wan 2.2 A14B as students: what the stages ask of their pipelines.

Wan 2.2 A14B has Wan 2.1's classes, VAE and text encoder, and two transformers: `transformer` for
timesteps from `boundary_ratio` of the schedule on, `transformer_2` for those below, as WanPipeline
chooses them (diffusers@0.42.1, pipelines/wan/pipeline_wan.py). One run trains one of them.

Legend: B clip, F latent frame, C channel, H W latent, L text or image token, D width, T frame.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import ClipsConfig
from stages.config import SchedulerName
from stages.files.hashes import sha256_of_folder
from stages.files.weight_checks import read_config
from stages.students.student import (
    VAE_SPATIAL_COMPRESSION,
    VAE_TEMPORAL_COMPRESSION,
    Condition,
    FirstFrameEncoder,
    StudentConfigs,
)
from stages.students.wan.first_frames import (
    ImageEncoder,
    clip_tokens,
    encode_latents,
    first_frame_clip,
)
from stages.students.wan.flow import FlowSchedule

TEXT_LENGTH = 512
"""Text tokens, to which the pipelines pad; the transformer's code relies on it."""

_PATCH = [1, 2, 2]
_MASK_CHANNELS = VAE_TEMPORAL_COMPRESSION
"""Input channels of image-to-video that say which frames of each latent are given."""
_VAE_CLASS = "AutoencoderKLWan"
_TEXT_CLASS = "UMT5EncoderModel"

_ORIGINAL = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_([qkv])$", r"_attn.\1"),
    (r"_attn\.to_out\.0$", "_attn.o"),
    (r"_attn\.add_([kv])_proj$", r"_attn.\1_img"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^proj_out$", "head.head"),
)
"""Module names of diffusers' WanTransformer3DModel -> Wan's own, which ComfyUI and musubi-tuner use
(diffusers' scripts/convert_wan_to_diffusers.py@0122271)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WanConfigs(StudentConfigs):
    """A pipeline of Wan 2.1 (text-to-video 1.3B and 14B, image-to-video 14B) or Wan 2.2 A14B."""

    FAMILY: ClassVar[str] = "Wan"
    HUB_EXAMPLE: ClassVar[str] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    COMPONENTS: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {
        "tokenizer": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
        "text_encoder": ("transformers", (_TEXT_CLASS,)),
        "vae": ("diffusers", (_VAE_CLASS,)),
        "transformer": ("diffusers", ("WanTransformer3DModel",)),
        "transformer_2": ("diffusers", ("WanTransformer3DModel",)),
        "scheduler": ("diffusers", ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")),
        "image_encoder": ("transformers", ("CLIPVisionModel", "CLIPVisionModelWithProjection")),
        # One class, which transformers saves by the name of what resizes for it.
        "image_processor": (
            "transformers",
            ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
        ),
    }
    INDEX_OPTIONS: ClassVar[frozenset[str]] = frozenset({"boundary_ratio", "expand_timesteps"})
    PIPELINES: ClassVar[Mapping[str, bool]] = {
        "WanPipeline": False,
        "WanImageToVideoPipeline": True,
    }
    BLOCKS: ClassVar[str] = "blocks"
    FLOAT32_PARTS: ClassVar[frozenset[str]] = frozenset({"vae", "image_encoder"})
    DEFAULT_FPS: ClassVar[float] = 16.0

    @classmethod
    def check_index(cls, file: Path, index: Mapping[str, Any]) -> None:
        """Refuse two transformers without a boundary between them, and Wan 2.2's own VAE."""
        two = index.get("transformer_2", [None, None]) != [None, None]
        ratio = index.get("boundary_ratio")
        if two != (ratio is not None):
            raise ValueError(
                f"{file}: transformer_2 and boundary_ratio belong together (Wan 2.2 A14B), but are "
                f"{index.get('transformer_2')} and {ratio}; download the model again"
            )
        if ratio is not None and not (type(ratio) in (int, float) and 0 < ratio < 1):
            raise ValueError(
                f"{file}: boundary_ratio must be a number between 0 and 1, got {ratio!r}; Wan 2.2 "
                "A14B has 0.875 for text-to-video and 0.9 for image-to-video"
            )
        if index.get("expand_timesteps"):
            raise ValueError(
                f"{file}: Wan 2.2 TI2V-5B, with a VAE of 16x spatial compression, is not supported "
                f"yet; use Wan 2.2 A14B or Wan 2.1, such as {cls.HUB_EXAMPLE}"
            )

    def check(self) -> None:
        """Refuse transformers and VAEs that are not those of Wan 2.1 or Wan 2.2 A14B."""
        self.check_vae()
        config = self.transformer
        if list(config["patch_size"]) != _PATCH:
            raise ValueError(
                f"the transformer in {self.folder} has patches of {list(config['patch_size'])} "
                f"(frames, height, width); only {_PATCH} is supported, as in every Wan 2.1 model"
            )
        channels = config["in_channels"] - self.latent_channels
        if channels not in (0, _MASK_CHANNELS + self.latent_channels):
            raise ValueError(
                f"the transformer in {self.folder} has {config['in_channels']} input and "
                f"{self.latent_channels} output channels; supported are equally many "
                f"(text-to-video) and {_MASK_CHANNELS + 2 * self.latent_channels} input channels "
                "(image-to-video)"
            )
        if config["pos_embed_seq_len"] is not None:
            raise ValueError(
                f"the transformer in {self.folder} takes a first and a last frame "
                "(pos_embed_seq_len); only text-to-video and image-to-video are supported"
            )
        if self.vae["z_dim"] != self.latent_channels:
            raise ValueError(
                f"the VAE in {self.folder} has latents of {self.vae['z_dim']} channels, the "
                f"transformer predicts {self.latent_channels}; they belong to different models"
            )

    @property
    def trained_timesteps(self) -> range:
        """All, or those at which the pipeline calls the expert."""
        if self.expert is None or self.boundary_ratio is None:
            return range(self.timesteps)
        first_high = self.schedule(torch.device("cpu")).first_at(self.boundary_ratio)
        high_noise = self.expert == "high-noise"
        return range(first_high, self.timesteps) if high_noise else range(first_high)

    @property
    def image_to_video(self) -> bool:
        """Whether the transformer also takes a mask and the first frame's latents."""
        return bool(self.transformer["in_channels"] > self.latent_channels)

    @property
    def condition_channels(self) -> int:
        """The mask's channels and the first frame's latents."""
        return _MASK_CHANNELS + self.latent_channels if self.image_to_video else 0

    @property
    def image_embeds_shape(self) -> tuple[int, int] | None:
        """CLIP's states; None for text-to-video and for Wan 2.2."""
        width = self.transformer["image_dim"]
        return None if width is None else (clip_tokens(self.folder), int(width))

    @property
    def text_shape(self) -> tuple[int, int]:
        """Length and width of the text embeddings."""
        return TEXT_LENGTH, int(self.transformer["text_dim"])

    @property
    def patch_size_t(self) -> int:
        """Every latent frame has its tokens."""
        return 1

    def token_grid(
        self, num_latents: int, latent_height: int, latent_width: int
    ) -> tuple[int, int, int]:
        """Tokens in time, height and width for a clip of this latent size."""
        _, height, width = _PATCH
        return num_latents, latent_height // height, latent_width // width

    def text_settings(self) -> dict[str, JSON]:
        """The class, which tells the store from CogVideoX's."""
        return {"class": _TEXT_CLASS}

    def embed_caption(self, tokenizer: Any, encoder: Any, caption: str) -> tuple[Tensor, int]:
        """Cleaned, attended up to its length, and zeros after it, as WanPipeline."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        text = prompt_clean(caption)
        tokens = tokenizer(
            [text],
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        whole = tokenizer([text], add_special_tokens=True).input_ids[0]
        mask_1L = tokens.attention_mask.to(encoder.device)
        states_1LD = encoder(tokens.input_ids.to(encoder.device), mask_1L).last_hidden_state
        embeds_LD: Tensor = states_1LD[0].masked_fill(mask_1L[0, :, None] == 0, 0.0)
        return embeds_LD, len(whole)

    def latents_settings(self) -> dict[str, JSON]:
        """The class, and the normalisation."""
        return {
            "class": _VAE_CLASS,
            "latent_channels": self.vae["z_dim"],
            "latents_mean": list(self.vae["latents_mean"]),
            "latents_std": list(self.vae["latents_std"]),
        }

    def check_vae(self) -> None:
        """Compare the compression."""
        found = self.vae["scale_factor_temporal"], self.vae["scale_factor_spatial"]
        wanted = (VAE_TEMPORAL_COMPRESSION, VAE_SPATIAL_COMPRESSION)
        if found != wanted or self.vae["patch_size"] is not None:
            raise ValueError(
                f"the VAE in {self.folder} compresses time and space by {found}; only Wan 2.1's is "
                f"supported, which compresses by {wanted}, and not yet the 16x VAE of Wan 2.2 "
                "TI2V-5B"
            )

    def check_latents(self, base: Mapping[str, Any]) -> str | None:
        """Compare the VAE's class and normalisation."""
        if base.get("class") != _VAE_CLASS:
            return f"a VAE of another class than {_VAE_CLASS}, the base model's"
        for name, value in self.latents_settings().items():
            if base.get(name) != value:
                return f"a VAE whose {name} is {base.get(name)}; the base model's is {value}"
        return None

    def check_text(self, base: Mapping[str, Any]) -> str | None:
        """Compare the text encoder's class."""
        if base.get("class") != _TEXT_CLASS:
            return f"a text encoder of another class than {_TEXT_CLASS}, the base model's"
        return None

    def first_frame_settings(self, *, seed: int, draws: int) -> dict[str, JSON]:
        """The image encoder's files; nothing is drawn."""
        if self.image_embeds_shape is None:
            return {}
        names = ("image_encoder", "image_processor")
        return {f"{name}_sha256": sha256_of_folder(self.folder / name) for name in names}

    def first_frame_arrays(self, clips: ClipsConfig, *, draws: int) -> dict[str, ArraySpec]:
        """Latents of the first frame before a grey clip, and CLIP's states."""
        if not self.image_to_video:
            return {}
        latents = ArraySpec(
            dtype="float16",
            shape=(clips.num_latent_frames, self.latent_channels, *clips.latent_size),
            dimension_names=("f", "c", "h", "w"),
        )
        arrays = {"image_latents": latents}
        if self.image_embeds_shape is not None:
            arrays["image_embeds"] = ArraySpec(
                dtype="float16", shape=self.image_embeds_shape, dimension_names=("l", "d")
            )
        return arrays

    def first_frame_encoder(
        self, vae: Any, device: torch.device, *, seed: int, draws: int
    ) -> FirstFrameEncoder:
        """Load CLIP, if the model takes its states."""
        encoder = None
        if self.image_embeds_shape is not None:
            _, name = read_config(self.folder / "model_index.json")["image_encoder"]
            encoder = ImageEncoder(self.folder, self.model_class("image_encoder", name), device)

        def encode(pixels_BCTHW: Tensor, key: str) -> dict[str, Any]:
            arrays = {"image_latents": encode_latents(vae, pixels_BCTHW)}
            if encoder is not None:
                arrays["image_embeds"] = encoder(pixels_BCTHW[0, :, 0])
            return arrays

        return encode

    def run_first_frame(self, vae: Any, pixels_BCTHW: Tensor, *, draws: int) -> None:
        """One pass of the whole clip; CLIP's is under a hundredth of it and not counted."""
        vae.encode(first_frame_clip(pixels_BCTHW))

    def scale_latents(self, latents_FCHW: Tensor) -> Tensor:
        """Normalise each channel by the VAE's mean and standard deviation."""
        mean, std = (
            latents_FCHW.new_tensor(self.vae[name]).view(-1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return (latents_FCHW - mean) / std

    def pad_in_front(self, latents_FCHW: Tensor) -> Tensor:
        """Wan needs no padding."""
        return latents_FCHW

    def condition(
        self, stored: Mapping[str, Tensor], num_latents: int, generator: torch.Generator
    ) -> Condition:
        """A mask of ones at the first latent frame, and the stored latents."""
        latents_FCHW = self.scale_latents(stored["image_latents"].float())
        mask_FCHW = latents_FCHW.new_zeros(num_latents, _MASK_CHANNELS, *latents_FCHW.shape[2:])
        mask_FCHW[0] = 1.0
        # Wan 2.1's latents may be those of Wan 2.2, which takes no states of CLIP.
        embeds_LD = None if self.image_embeds_shape is None else stored["image_embeds"]
        return Condition(torch.cat([mask_FCHW, latents_FCHW], dim=1), embeds_LD)

    def check_condition(self, latents: StoreSettings, clips: ClipsConfig) -> str | None:
        """Compare the shapes of the arrays."""
        for name, spec in self.first_frame_arrays(clips, draws=1).items():
            found = latents.arrays[name].shape
            if found != spec.shape:
                return (
                    f"holds {name} of {found}; the image-to-video model and the clips need "
                    f"{spec.shape}"
                )
        return None

    def schedule(self, device: torch.device) -> FlowSchedule:
        """Flow matching with the scheduler's shift."""
        return FlowSchedule(self.scheduler, device)

    def shape_inputs(
        self, num_latents: int, latent_height: int, latent_width: int, device: torch.device
    ) -> dict[str, Any]:
        """None: the transformer computes its positions."""
        return {}

    def transformer_inputs(
        self,
        latents_BFCHW: Tensor,
        text_BLD: Tensor,
        timestep_B: Tensor,
        image_BLD: Tensor | None = None,
    ) -> dict[str, Any]:
        """Latents with channels before frames."""
        return {
            "hidden_states": latents_BFCHW.transpose(1, 2),
            "timestep": timestep_B,
            "encoder_hidden_states": text_BLD,
            "encoder_hidden_states_image": image_BLD,
        }

    def prediction(self, output: Tensor) -> Tensor:
        """The output has channels before frames."""
        return output.transpose(1, 2)

    def check_sampling(self, *, scheduler: SchedulerName, dynamic_cfg: bool) -> None:
        """Refuse CogVideoX's samplers and guidance."""
        if scheduler != "model":
            raise ValueError(
                f"sample.scheduler={scheduler} is a sampler of CogVideoX; Wan has its own: set "
                "sample.scheduler=model"
            )
        if dynamic_cfg:
            raise ValueError("sample.dynamic_cfg is for CogVideoX; set it to false for Wan")

    @classmethod
    def sampling_arguments(cls, pipeline: Any, *, dynamic_cfg: bool) -> dict[str, Any]:
        """The text's length."""
        return {"max_sequence_length": TEXT_LENGTH}

    @classmethod
    def lora_layer_name(cls, module: str, form: str) -> str:
        """Wan's own names; for musubi-tuner (kohya) with underscores."""
        for pattern, replacement in _ORIGINAL:
            module = re.sub(pattern, replacement, module)
        if form == "kohya":
            return f"lora_unet_{module.replace('.', '_')}"
        return f"diffusion_model.{module}"
