"""Settings of the built-in demo's data and models."""

from pathlib import Path

from pydantic import Field

from stages.config import Section


class DemoConfig(Section):
    """The procedural dataset and the tiny models, made when they are missing."""

    root: Path = Path("demo")
    """Folder that holds everything the demo makes: clips/, models/, cache/, runs/."""
    num_clips: int = Field(default=24, ge=1)
    """Clips to draw; 24 is usual."""
    clips_per_tar: int = Field(default=8, ge=1)
    """Clips per webdataset tar; 8 is usual."""
    seed: int = Field(default=0, ge=0)
    """Seeds figures, backgrounds, gaits and the tiny tracker; 0 is usual."""
    image_to_video: bool = False
    """Take an image-to-video pipeline, whose transformer is untrained, instead of text-to-video."""
