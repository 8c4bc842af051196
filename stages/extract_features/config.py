"""Settings of stage one."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.config import Precision, Section

Kind = Literal["teacher", "latents", "text"]
"""The stores that stage one writes."""


class TeacherConfig(Section):
    """SAM2 over each clip, both ways, fused per frame."""

    checkpoint: Path = Path("checkpoints/sam2.1_hiera_large.pt")
    """An official SAM2 or SAM2.1 checkpoint, or one in the same format."""
    config: str = "sam2.1_hiera_l"
    """Name of an official SAM2 configuration (sam2.1_hiera_t, _s, _b+, _l; sam2_hiera_…), or the
    path of a YAML file in their format."""
    image_size: int = Field(default=1024, ge=64, multiple_of=32)
    """Side in pixels of the square SAM2 sees; 1024 is what it was trained at, 512 is a quarter of
    the cost."""
    features: Literal["memory_attention", "memory_encoder"] = "memory_attention"
    """Which features: the frame after memory attention, or the stored memory."""
    fusion: Literal["gram_flow", "average", "forward"] = "gram_flow"
    """How the two directions become one: exact in Gram-flow space (the paper), averaged (ablation),
    or the forward pass alone (ablation)."""
    forward_weight: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share a of the forward direction: S = a S_fwd + (1-a) S_bwd; 0.5 is usual."""
    time_rate: Literal["frame", "latent"] = "frame"
    """One feature map per frame, or the mean over each latent frame's frames."""
    precision: Precision = "fp32"
    """Arithmetic of the tracker; bf16 on a GPU."""


class LatentsConfig(Section):
    """The VAE's posterior of each clip, and of its first frame for image-to-video."""

    precision: Precision = "fp32"
    """Arithmetic of the VAE; bf16 on a GPU."""
    tiling: bool = False
    """Encode in overlapping tiles: less memory, slightly different values."""


class TextConfig(Section):
    """The text encoder's states of each caption."""

    precision: Precision = "fp32"
    """Arithmetic of the text encoder; bf16 on a GPU."""


class ExtractConfig(Section):
    """What stage one computes and where it runs."""

    kinds: tuple[Kind, ...] = Field(default=("text", "latents", "teacher"), min_length=1)
    """The stores to write, one big model at a time, in this order."""
    device: str = "auto"
    """auto takes CUDA when there is one; otherwise a torch device such as cuda:1 or cpu."""
    seed: int = 0
    """Seeds the noise on image-to-video's first frames, per clip."""
    max_skipped: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of clips that may be skipped before the command exits with 3; 0.1 is usual."""
    teacher: TeacherConfig = TeacherConfig()
    latents: LatentsConfig = LatentsConfig()
    text: TextConfig = TextConfig()
