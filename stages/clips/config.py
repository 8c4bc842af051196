"""Settings of the video dataset and of the training size; read by every stage."""

from pathlib import Path

from pydantic import Field, model_validator

from stages.config import Section


class ClipsConfig(Section):
    """Which clips, and the size, length and rate they are brought to."""

    path: Path
    """Folder of webdataset tars, one tar, or a folder with metadata.jsonl or metadata.csv."""
    num_frames: int = Field(default=49, ge=5)
    """Frames per clip, 4N+1 (the VAE's rate); 49 for CogVideoX 1.0."""
    height: int = Field(default=480, ge=16, multiple_of=16)
    """Training height in pixels, a multiple of 16; 480 for CogVideoX 1.0."""
    width: int = Field(default=720, ge=16, multiple_of=16)
    """Training width in pixels, a multiple of 16; 720 for CogVideoX 1.0."""
    fps: float | None = Field(default=8.0, gt=0)
    """Frames per second the clip is sampled at; 8 for CogVideoX 1.0. null takes consecutive frames
    as they are stored."""
    clips_per_shard: int = Field(default=64, ge=1)
    """How many clips of a metadata folder make one shard (a tar is always one); 64 is usual."""

    @model_validator(mode="after")
    def _frames_fit_the_vae(self) -> "ClipsConfig":
        if self.num_frames % 4 != 1:
            raise ValueError(
                f"num_frames must be 4N+1, got {self.num_frames}; 49 is usual (13 latent frames)"
            )
        return self

    @property
    def num_latent_frames(self) -> int:
        """Frames after the VAE's 4x temporal compression."""
        return (self.num_frames - 1) // 4 + 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latent (VAE 8x)."""
        return self.height // 8, self.width // 8

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of the transformer's token grid (VAE 8x, patch 2)."""
        return self.height // 16, self.width // 16
