"""Base class of configuration sections, and the types and sections that several stages share."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["fp32", "bf16", "fp16"]
"""Floating-point formats by their names in a configuration."""

Pairs = Literal["forward", "backward", "both", "crossed"]
"""Directions in which adjacent frames are compared: t -> t+1, t+1 -> t, or both; `crossed` is both,
each computed from the track that runs in the opposite direction."""

FeatureKind = Literal["memory_attention", "memory_encoder", "image_encoder"]
"""SAM2 features: the frame's features after memory attention, its memory encoder output, or its
image encoder output, before memory attention."""

SchedulerName = Literal["model", "ddim", "dpm"]
"""Samplers of CogVideoX: the base model's own scheduler, or one of diffusers' two for it."""

Expert = Literal["high-noise", "low-noise"]
"""The transformers of a model with two (Wan 2.2 A14B): `transformer` denoises while there is much
noise, `transformer_2` afterwards."""

FrameScoreGroup = Literal["figures", "vbench", "appearance"]
"""Scores of a video's frames: the limbs of the demo's figures; VBench's dimensions of motion and
consistency; the frames' appearance."""

ScoreGroup = Literal["structure", FrameScoreGroup]
"""Groups of scores; structure is the subject's, from SAM2's tracks."""


class Section(BaseModel):
    """Base class of configuration sections: typed, frozen, unknown keys are rejected.

    The docstring under a field is its help text. It is printed when validation fails, so for a
    bounded field it ends with the usual value.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class BaseModelConfig(Section):
    """The pipeline to fine-tune, of CogVideoX or Wan: official, or saved in the same layout."""

    path: str
    """Folder of a diffusers pipeline, or its hub id; zai-org/CogVideoX-5b is usual. Its
    model_index.json says which family it is of."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null uses the default branch."""
    expert: Expert | None = None
    """Transformer that `train` and `probe` use of a model with two (Wan 2.2 A14B), on the timesteps
    at which it denoises; null for all other models. Extraction and sampling do not depend on it."""

    @property
    def is_local(self) -> bool:
        """Whether `path` is a folder on this machine rather than a hub id."""
        return Path(self.path).expanduser().is_dir()
