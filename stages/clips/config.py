"""Settings of the video dataset and of the training size."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stages.config import Section


def check_num_frames(num_frames: int) -> None:
    """Reject a number of frames that the VAE does not reconstruct.

    The VAE encodes 4(N-1)+1 frames as N latent frames, but decodes latent frames in pairs with the
    odd one first: an even N yields three additional frames. So N must be odd, and num_frames 8N+1.

    Raises:
        ValueError: num_frames is not of the form 8N+1.
    """
    if num_frames % 8 != 1:
        raise ValueError(f"num_frames must be 8N+1, got {num_frames}; 49 is usual")


class ClipsConfig(Section):
    """The video dataset, and the size, length and frame rate that clips are converted to."""

    path: Path
    """Folder, file or pattern: webdataset tars ('clips/{00000..00003}.tar'); metadata.jsonl or
    metadata.csv; prompts.txt and videos.txt; or videos with captions beside them. A relative path
    is resolved against the working directory."""
    num_frames: int = Field(default=49, ge=9)
    """Frames per clip, 8N+1 (9, 17, 25, 33, …); 49 for CogVideoX 1.0, 81 for Wan."""
    height: int = Field(default=480, ge=16, multiple_of=16)
    """Training height in pixels, a multiple of 16; 480 for CogVideoX 1.0."""
    width: int = Field(default=720, ge=16, multiple_of=16)
    """Training width in pixels, a multiple of 16; 720 for CogVideoX 1.0, 832 for Wan."""
    fps: float | None = Field(default=8.0, gt=0)
    """Frames per second at which clips are sampled; 8 for CogVideoX 1.0, 16 for Wan. null takes
    consecutive frames as stored."""
    hdr: Literal["tone_map", "skip"] = "tone_map"
    """Handling of HDR videos (PQ, HLG): tone_map converts them to SDR, skip excludes them."""
    interlaced: Literal["deinterlace", "skip"] = "deinterlace"
    """Handling of interlaced videos: deinterlace applies FFmpeg's bwdif, skip excludes them."""
    buckets: tuple[str, ...] = ()
    """Several sizes instead of one, each as frames x height x width: [49x480x720, 49x720x480,
    81x480x720]. Each clip is assigned to the one that fits it best; a training step uses clips of
    one size. With [] all clips are converted to num_frames, height and width."""
    clips_per_shard: int = Field(default=64, ge=1)
    """Clips per shard if the dataset is not stored in tars (each tar is one shard); 64 is usual."""

    @field_validator("buckets")
    @classmethod
    def _check_buckets(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        sizes = [_parse_size(name) for name in names]
        written = tuple("x".join(map(str, size)) for size in sizes)
        twice = sorted({name for name in written if written.count(name) > 1})
        if twice:
            raise ValueError(f"buckets must name each size once, got {twice[0]} twice")
        return written

    @model_validator(mode="after")
    def _check_num_frames(self) -> "ClipsConfig":
        check_num_frames(self.num_frames)
        return self

    @property
    def sizes(self) -> tuple["ClipsConfig", ...]:
        """One copy of these settings per bucket; without buckets, only these settings."""
        if not self.buckets:
            return (self,)
        names = ("num_frames", "height", "width")
        return tuple(
            self.model_copy(update={**dict(zip(names, _parse_size(name), strict=True))})
            for name in self.buckets
        )

    @property
    def size_name(self) -> str:
        """Frames x height x width, in the format of `buckets`."""
        return f"{self.num_frames}x{self.height}x{self.width}"

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


def _parse_size(name: str) -> tuple[int, int, int]:
    """Parse a size such as `49x480x720` into frames, height and width.

    Raises:
        ValueError: The format is wrong, or the size is not valid for training.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", name.strip())
    if found is None:
        raise ValueError(f"a bucket is frames x height x width, got {name!r}; 49x480x720 is usual")
    frames, height, width = (int(number) for number in found.groups())
    if frames < 9 or frames % 8 != 1:
        raise ValueError(f"the frames of a bucket must be 8N+1, got {name!r}; 49x480x720 is usual")
    if not height or not width or height % 16 or width % 16:
        raise ValueError(
            f"height and width of a bucket must be multiples of 16, got {name!r}; 49x480x720 is "
            "usual"
        )
    return frames, height, width
