"""What every section of the configuration has in common, and the sections several stages share."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["fp32", "bf16", "fp16"]
"""Names of floating-point formats as they are written in a configuration."""

Pairs = Literal["forward", "backward", "both", "crossed"]
"""Which neighbouring frames are compared: t -> t+1, t+1 -> t, or both ways; `crossed` is both ways,
each from the track that runs the other way."""

FeatureKind = Literal["memory_attention", "memory_encoder"]
"""Which of SAM2's features: the frame after memory attention, or the memory stored of it."""


class Section(BaseModel):
    """One section of the configuration: typed, frozen, with no key that nobody reads.

    The docstring under a field is its help text; where a bound can be violated it ends with the
    usual value, since it is printed when validation fails.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class BaseModelConfig(Section):
    """The CogVideoX pipeline that is taught: an official one, or one saved in the same layout."""

    path: str
    """Folder of a diffusers pipeline, or its hub id; zai-org/CogVideoX-5b is a usual value."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the newest."""

    @property
    def is_local(self) -> bool:
        """Whether `path` is a folder on this machine rather than a hub id."""
        return Path(self.path).expanduser().is_dir()
