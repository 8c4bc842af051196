"""Settings of the features of videos."""

from pydantic import Field

from stages.config import Section


class FeaturesConfig(Section):
    """Distances between sets of videos over the features of a network."""

    network: str | None = None
    """TorchScript file called as StyleGAN-V's i3d_torchscript.pt, or folder in
    transformers' format or hub id of a VideoMAE or V-JEPA 2; null computes no distance."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null uses the default branch."""
    num_frames: int | None = Field(default=None, ge=1)
    """Frames per video, its first ones at the rate of data.fps; null takes the network's own: 16
    for TorchScript and VideoMAE, 64 for most V-JEPA 2. Shorter videos are left out and counted."""
    max_clips: int = Field(default=2048, ge=10)
    """Clips per set at most, of larger sets spread evenly over them; 2048 is usual."""
    allow_few: bool = False
    """Compute the Frechet distance of fewer than 256 videos per set, whose bias may exceed the
    difference between two models; false is usual."""
