"""Settings of VBench's dimensions: where their networks are."""

from pathlib import Path

from stages.config import Section


class VBenchConfig(Section):
    """The networks of VBench's dimensions; a dimension whose network is null has no value."""

    dino: str | None = None
    """DINO ViT-B/16, for subject consistency: a folder in transformers' format or a hub id;
    facebook/dino-vitb16 is VBench's."""
    clip: str | None = None
    """CLIP ViT-B/32, for background consistency: a folder in transformers' format or a hub id;
    openai/clip-vit-base-patch32 is VBench's."""
    raft: Path | None = None
    """RAFT, for dynamic degree and the static filter of temporal flickering: torchvision's file
    raft_large_C_T_V1-22a6c225.pth is VBench's; it needs torchvision."""
    amt: Path | None = None
    """AMT-S as TorchScript, for motion smoothness; stages/evaluate/README.md says how to export
    it."""
    dinov2: str | None = None
    """DINOv2 ViT-B/14, for the subject consistency of videos of 5 s and more: a folder in
    transformers' format or a hub id; facebook/dinov2-base is VBench-Long's. Without it their
    subject consistency is within pieces of 2 s only."""
    dreamsim: Path | None = None
    """DreamSim as TorchScript, for the background consistency of videos of 5 s and more;
    stages/evaluate/README.md says how to export it. Without it their background consistency is
    within pieces of 2 s only."""
