"""Settings of sampling."""

from pydantic import Field, model_validator

from stages.clips.config import check_num_frames
from stages.config import Precision, Section


class SampleConfig(Section):
    """Settings of video generation."""

    steps: int = Field(default=50, ge=1)
    """Denoising steps; 50 is usual."""
    guidance: float = Field(default=6.0, ge=1.0)
    """Classifier-free guidance scale; 6 is usual, 1 turns it off."""
    seed: int = 0
    """Seeds the initial noise."""
    num_frames: int | None = Field(default=None, ge=9)
    """Frames to generate, 8N+1; null takes the clips' length (49)."""
    device: str = "auto"
    """A torch device, or auto: CUDA if available, otherwise the CPU."""
    precision: Precision = "bf16"
    """Dtype of the models; bf16 is usual on a GPU, fp32 on a CPU."""
    cpu_offload: bool = False
    """Move each model to the GPU only while it runs: slower, fits a 24 GB card."""

    @model_validator(mode="after")
    def _frames_fit_the_vae(self) -> "SampleConfig":
        if self.num_frames is not None:
            check_num_frames(self.num_frames)
        return self
