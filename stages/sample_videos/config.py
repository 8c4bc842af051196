"""Settings of sampling."""

from typing import Any, Literal

from pydantic import Field, model_validator

from stages.clips.config import ClipsConfig, check_num_frames
from stages.config import Precision, SchedulerName, Section

MAX_SEED = 2**63 - 1


class SampleConfig(Section):
    """Settings of video generation."""

    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps; 50 is usual."""
    guidance: float = Field(default=6.0, ge=1.0)
    """Classifier-free guidance scale; 6 is usual, 1 turns it off."""
    dynamic_cfg: bool = False
    """Vary the guidance scale between 1 and 1 + guidance: diffusers' use_dynamic_cfg, turned on in
    CogVideoX's own scripts. It jumps from step to step while the noise is high."""
    scheduler: SchedulerName = "model"
    """Sampler: model is the base model's own (official ones: DDIM); ddim and dpm are diffusers' for
    CogVideoX, with trailing timesteps as in its own scripts. dpm adds noise at each step."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seeds the initial noise, unless --seed or a prompt file names one; 0 is usual."""
    num_frames: int | None = Field(default=None, ge=9)
    """Frames to generate, 8N+1; null takes the clips' length (49)."""
    height: int | None = Field(default=None, ge=16, multiple_of=16)
    """Height in pixels, a multiple of 16; null takes the clips' height (480)."""
    width: int | None = Field(default=None, ge=16, multiple_of=16)
    """Width in pixels, a multiple of 16; null takes the clips' width (720)."""
    fps: float | None = Field(default=None, gt=0, le=240)
    """Frames per second of the written video; null takes the clips' rate (8)."""
    lora_scale: float = Field(default=1.0, ge=0.0)
    """Factor on the run's adapters; 1 is as trained, 0 is the base model."""
    device: str = "auto"
    """A torch device, or auto: CUDA if available, otherwise the CPU."""
    precision: Precision = "bf16"
    """Dtype of the models; bf16 is usual on a GPU, fp32 on a CPU."""
    offload: Literal["none", "model", "sequential"] = "none"
    """What moves to the GPU only while it runs: model moves whole models and fits a 24 GB card;
    sequential moves single layers, far slower, and fits a few GB."""
    tiling: bool = False
    """Decode the latents in overlapping tiles: less memory, blended edges; usual with offload."""

    @model_validator(mode="after")
    def _frames_fit_the_vae(self) -> "SampleConfig":
        if self.num_frames is not None:
            check_num_frames(self.num_frames)
        return self

    def video_size(self, clips: ClipsConfig) -> ClipsConfig:
        """Size, length and rate of videos: these settings, otherwise the clips' first size."""
        chosen: dict[str, Any] = {
            "num_frames": self.num_frames,
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
        }
        update = {name: value for name, value in chosen.items() if value is not None}
        return clips.sizes[0].model_copy(update=update)
