"""Settings of the built-in demo's data and models."""

from pathlib import Path

from pydantic import Field

from stages.config import Section


class DemoConfig(Section):
    """The procedural dataset and the tiny models, built if they are missing."""

    root: Path = Path("demo")
    """Folder for everything the demo creates: clips/, models/, cache/, runs/."""
    num_clips: int = Field(default=24, ge=1)
    """Number of clips to draw; 24 is usual."""
    clips_per_tar: int = Field(default=8, ge=1)
    """Clips per webdataset tar; 8 is usual."""
    seed: int = Field(default=0, ge=0)
    """Random seed of figures, backgrounds, gaits and the tiny SAM2; 0 is usual."""
    image_to_video: bool = False
    """Use an image-to-video pipeline (with an untrained transformer) instead of text-to-video."""
