"""CogVideoX as a student: what the stages ask of its pipelines.

Legend: B clip, F latent frame, C channel, H W latent, L text token, D width, T frame.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import ClipsConfig
from stages.config import SchedulerName
from stages.students.cogvideox.diffusion import VelocitySchedule
from stages.students.cogvideox.first_frames import NOISE_LOG_MEAN, NOISE_LOG_STD, encode_draws
from stages.students.cogvideox.inputs import image_condition, pad_in_front
from stages.students.latents import sample_posterior
from stages.students.student import (
    VAE_SPATIAL_COMPRESSION,
    VAE_TEMPORAL_COMPRESSION,
    Condition,
    FirstFrameEncoder,
    StudentConfigs,
)

OFS = 2.0
"""Value of the transformer's `ofs` input in the CogVideoX 1.5 image-to-video pipeline."""

# rotary.py is imported late: diffusers would cost each spawned loader process 170 MB and seconds.

_VAE_CLASS = "AutoencoderKLCogVideoX"
_TEXT_CLASS = "T5EncoderModel"

_COMFYUI = (
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_([qkv])$", r".\1"),
    (r"\.attn1\.to_out\.0$", ".attn_out"),
    (r"\.ff\.net\.0\.proj$", ".ff_proj"),
    (r"\.ff\.net\.2$", ".ff_out"),
    (r"^(time|ofs)_embedding\.", r"\1_embedding_"),
)
"""Module names of diffusers' CogVideoXTransformer3DModel -> ComfyUI's
(comfy/ldm/cogvideo/model.py); all others are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CogVideoXConfigs(StudentConfigs):
    """A CogVideoX pipeline: 2B, 5B and 1.5, text-to-video and image-to-video."""

    FAMILY: ClassVar[str] = "CogVideoX"
    HUB_EXAMPLE: ClassVar[str] = "zai-org/CogVideoX-5b"
    COMPONENTS: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {
        "tokenizer": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
        "text_encoder": ("transformers", (_TEXT_CLASS,)),
        "vae": ("diffusers", (_VAE_CLASS,)),
        "transformer": ("diffusers", ("CogVideoXTransformer3DModel",)),
        "scheduler": ("diffusers", ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")),
    }
    PIPELINES: ClassVar[Mapping[str, bool]] = {
        "CogVideoXPipeline": False,
        "CogVideoXImageToVideoPipeline": True,
    }
    BLOCKS: ClassVar[str] = "transformer_blocks"
    DEFAULT_FPS: ClassVar[float] = 8.0

    def check(self) -> None:
        """Reject other numbers of input channels than text-to-video and image-to-video have."""
        channels = self.transformer["in_channels"], self.transformer["out_channels"]
        if channels[0] not in (channels[1], 2 * channels[1]):
            raise ValueError(
                f"the transformer in {self.folder} has {channels[0]} input and {channels[1]} "
                "output channels; CogVideoX has equally many (text-to-video) or twice as many "
                "input channels (image-to-video)"
            )

    @property
    def image_to_video(self) -> bool:
        """Whether the transformer also takes the first frame's latents as input channels."""
        return bool(self.transformer["in_channels"] == 2 * self.transformer["out_channels"])

    @property
    def condition_channels(self) -> int:
        """The first frame's latents."""
        return self.latent_channels if self.image_to_video else 0

    @property
    def image_embeds_shape(self) -> None:
        """None: CogVideoX has no image encoder."""

    @property
    def text_shape(self) -> tuple[int, int]:
        """Length and width of the text embeddings."""
        config = self.transformer
        return int(config["max_text_seq_length"]), int(config["text_embed_dim"])

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

    def token_grid(
        self, num_latents: int, latent_height: int, latent_width: int
    ) -> tuple[int, int, int]:
        """Tokens in time, height and width for a clip of this latent size, with padding."""
        patch = self.transformer["patch_size"]
        padded = num_latents + self.padding(num_latents)
        return padded // self.patch_size_t, latent_height // patch, latent_width // patch

    def text_settings(self) -> dict[str, JSON]:
        """Empty: stores without the text encoder's class are CogVideoX's."""
        return {}

    def embed_caption(self, tokenizer: Any, encoder: Any, caption: str) -> tuple[Tensor, int]:
        """Padded to the full length, without an attention mask, as CogVideoXPipeline."""
        tokens = tokenizer(
            [caption],
            padding="max_length",
            max_length=self.text_shape[0],
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        whole = tokenizer([caption], add_special_tokens=True).input_ids[0]
        embeds_LD: Tensor = encoder(tokens.input_ids.to(encoder.device))[0][0]
        return embeds_LD, len(whole)

    def latents_settings(self) -> dict[str, JSON]:
        """The scaling, and channels."""
        names = ("scaling_factor", "invert_scale_latents", "latent_channels")
        return {name: self.vae[name] for name in names}

    def check_vae(self) -> None:
        """Compare the compression, from the temporal ratio and the number of halvings."""
        halvings = len(self.vae["block_out_channels"]) - 1
        found = (self.vae["temporal_compression_ratio"], 2**halvings)
        wanted = (VAE_TEMPORAL_COMPRESSION, VAE_SPATIAL_COMPRESSION)
        if found != wanted:
            raise ValueError(
                f"the VAE in {self.folder} compresses time and space by {found}; a CogVideoX VAE "
                f"compresses by {wanted}"
            )

    def check_latents(self, base: Mapping[str, Any]) -> str | None:
        """Compare the VAE's class, and the scaling where the store records it."""
        if (made_by := base.get("class", _VAE_CLASS)) != _VAE_CLASS:
            return f"a VAE of the class {made_by}; the base model's is {_VAE_CLASS}"
        for name in ("scaling_factor", "invert_scale_latents"):
            if name in base and base[name] != self.vae[name]:
                return f"a VAE whose {name} is {base[name]}; the base model's is {self.vae[name]}"
        return None

    def check_text(self, base: Mapping[str, Any]) -> str | None:
        """Compare the text encoder's class."""
        if (made_by := base.get("class", _TEXT_CLASS)) != _TEXT_CLASS:
            return f"a text encoder of the class {made_by}; the base model's is {_TEXT_CLASS}"
        return None

    def first_frame_settings(self, *, seed: int, draws: int) -> dict[str, JSON]:
        """The distribution of the noise on first frames, and how often it is drawn."""
        if not self.image_to_video:
            return {}
        noise: dict[str, JSON] = {"log_mean": NOISE_LOG_MEAN, "log_std": NOISE_LOG_STD}
        return {"image_noise": noise | {"seed": seed, "draws": draws}}

    def first_frame_arrays(self, clips: ClipsConfig, *, draws: int) -> dict[str, ArraySpec]:
        """Posterior of every noisy draw."""
        if not self.image_to_video:
            return {}
        spec = ArraySpec(
            dtype="float16",
            shape=(draws, int(self.vae["latent_channels"]), *clips.latent_size),
            dimension_names=("n", "c", "h", "w"),
        )
        return dict.fromkeys(("image_mean", "image_std"), spec)

    def first_frame_encoder(
        self, vae: Any, device: torch.device, *, seed: int, draws: int
    ) -> FirstFrameEncoder:
        """Encode noisy draws with the VAE."""
        return lambda pixels_BCTHW, key: encode_draws(
            vae, pixels_BCTHW[:, :, :1], key, seed=seed, draws=draws
        )

    def run_first_frame(self, vae: Any, pixels_BCTHW: Tensor, *, draws: int) -> None:
        """One pass of the first frame per draw."""
        for _ in range(draws):
            vae.encode(pixels_BCTHW[:, :, :1])

    def scale_latents(self, latents_FCHW: Tensor) -> Tensor:
        """Multiply by the VAE's scaling factor."""
        return self.latent_scale * latents_FCHW

    def pad_in_front(self, latents_FCHW: Tensor) -> Tensor:
        """Repeat the first latent frame, for the temporal patches of CogVideoX 1.5."""
        return pad_in_front(latents_FCHW, self.padding(len(latents_FCHW)))

    def condition(
        self, stored: Mapping[str, Tensor], num_latents: int, generator: torch.Generator
    ) -> Condition:
        """A posterior sample of one of the noisy draws, followed by zeros."""
        mean_NCHW, std_NCHW = stored["image_mean"], stored["image_std"]
        chosen = int(torch.randint(len(mean_NCHW), (1,), generator=generator))
        image_1CHW = sample_posterior(
            mean_NCHW[chosen : chosen + 1], std_NCHW[chosen : chosen + 1], generator
        )
        channels_FCHW = image_condition(self.image_latent_scale * image_1CHW, num_latents)
        return Condition(channels_FCHW, None)

    def check_condition(self, latents: StoreSettings, clips: ClipsConfig) -> str | None:
        """The draws must be as many as recorded, and of the clips' size."""
        found = {name: latents.arrays[name].shape for name in ("image_mean", "image_std")}
        draws = found["image_mean"][0]
        noise = latents.values.get("image_noise")
        if not isinstance(noise, dict) or noise.get("draws") != draws:
            return (
                "does not record how many noise draws it holds per first frame (image_noise.draws)"
            )
        expected = (draws, self.latent_channels, *clips.latent_size)
        for name, shape in found.items():
            if shape != expected:
                return (
                    f"holds {name} of {shape} (draws, channels, height, width); the "
                    f"image-to-video model needs {expected}"
                )
        return None

    def schedule(self, device: torch.device) -> VelocitySchedule:
        """Zero-terminal-SNR schedule with v-prediction."""
        return VelocitySchedule(self.scheduler, device)

    def shape_inputs(
        self, num_latents: int, latent_height: int, latent_width: int, device: torch.device
    ) -> dict[str, Any]:
        """Rotary tables and, in 1.5, the offset."""
        from stages.students.cogvideox.rotary import rotary_positions

        return {
            "ofs": None if self.ofs is None else torch.tensor([self.ofs], device=device),
            "image_rotary_emb": rotary_positions(
                self.transformer, num_latents, latent_height, latent_width, device
            ),
        }

    def transformer_inputs(
        self,
        latents_BFCHW: Tensor,
        text_BLD: Tensor,
        timestep_B: Tensor,
        image_BLD: Tensor | None = None,
    ) -> dict[str, Any]:
        """Latents, text and timestep by their names."""
        return {
            "hidden_states": latents_BFCHW,
            "encoder_hidden_states": text_BLD,
            "timestep": timestep_B,
        }

    def prediction(self, output: Tensor) -> Tensor:
        """The output is predicted_BFCHW."""
        return output

    def check_training_size(self, clips: ClipsConfig) -> None:
        """Learned positions (CogVideoX-5b-I2V) fit one size."""
        config = self.transformer
        if not config["use_learned_positional_embeddings"]:
            return
        # diffusers rejects other heights and widths; for other lengths it uses its own positions.
        frames, *trained = (config[f"sample_{name}"] for name in ("frames", "height", "width"))
        if (frames, *trained) != (clips.num_frames, *clips.latent_size):
            area = "x".join(str(side * VAE_SPATIAL_COMPRESSION) for side in trained)
            raise ValueError(
                f"the base model has learned positions and runs only at {frames}x{area} (frames x "
                f"height x width), not at {clips.size_name}; set data.num_frames, data.height and "
                "data.width to that size, and data.buckets to []"
            )

    def check_video_size(self, clips: ClipsConfig) -> None:
        """Learned positions (CogVideoX-5b-I2V) fit one height and width."""
        config = self.transformer
        if not config["use_learned_positional_embeddings"]:
            return
        height = int(config["sample_height"]) * VAE_SPATIAL_COMPRESSION
        width = int(config["sample_width"]) * VAE_SPATIAL_COMPRESSION
        if (clips.height, clips.width) != (height, width):
            raise ValueError(
                f"{self.folder} has learned positions for {height}x{width} and generates no other "
                f"size, got {clips.height}x{clips.width}; set sample.height={height} "
                f"sample.width={width}"
            )

    @classmethod
    def sampling_arguments(cls, pipeline: Any, *, dynamic_cfg: bool) -> dict[str, Any]:
        """Dynamic guidance, and the text's length, which the pipelines do not read."""
        length = pipeline.transformer.config.max_text_seq_length
        return {"use_dynamic_cfg": dynamic_cfg, "max_sequence_length": length}

    @classmethod
    def set_scheduler(cls, pipeline: Any, name: SchedulerName) -> None:
        """Choose a pipeline's sampler; `ddim` and `dpm` as CogVideoX's own scripts build them."""
        import diffusers

        if name == "model":
            return
        scheduler = (
            diffusers.CogVideoXDDIMScheduler if name == "ddim" else diffusers.CogVideoXDPMScheduler
        )
        pipeline.scheduler = scheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing"
        )

    @classmethod
    def lora_layer_name(cls, module: str, form: str) -> str:
        """ComfyUI's own names, or diffusers' with underscores (VideoX-Fun)."""
        if form == "kohya":
            return f"lora_unet__{module.replace('.', '_')}"
        for pattern, replacement in _COMFYUI:
            module = re.sub(pattern, replacement, module)
        return f"diffusion_model.{module}"
