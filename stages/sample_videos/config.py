"""Settings of sampling."""

from pydantic import Field

from stages.config import Precision, Section


class SampleConfig(Section):
    """How a video is drawn from the model."""

    steps: int = Field(default=50, ge=1)
    """Denoising steps; 50 is usual."""
    guidance: float = Field(default=6.0, ge=1.0)
    """Classifier-free guidance scale; 6 is usual, 1 turns it off."""
    seed: int = 0
    """Seeds the initial noise."""
    num_frames: int | None = Field(default=None, ge=5)
    """Frames to draw; null takes the clips' length (49)."""
    device: str = "auto"
    """auto takes CUDA when there is one; otherwise a torch device."""
    precision: Precision = "bf16"
    """Arithmetic of the models; bf16 on a GPU, fp32 on a CPU."""
    cpu_offload: bool = False
    """Move each model to the GPU only while it runs: slower, fits a 24 GB card."""
