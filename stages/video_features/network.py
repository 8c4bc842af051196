"""Networks that turn the frames of one clip into one vector, and what their features depend on.

Legend: T frame, H W pixels, C colour (RGB), D feature.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from cache_schema import JSON
from stages.clips import ClipsConfig
from stages.extract_features.extraction import clip_settings

FeatureFunction = Callable[[np.ndarray], np.ndarray]
"""From uint8 frames_THWC of one clip to its float32 features_D."""

_VERSION = 1
"""Increased when the code computes other features from the same settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureProtocol:
    """Everything that changes the features of a clip, besides the clip."""

    network: str
    """File name, folder name or hub id; a label, which changes nothing."""
    sha256: str
    """SHA-256 of the files that the network is loaded from."""
    clips: ClipsConfig
    """Number of frames, size and rate that clips are read at; the path is not used."""
    resize: str
    """How frames of that size become the network's input."""
    features: str
    """Which of the network's outputs is used."""

    @property
    def settings(self) -> dict[str, JSON]:
        """Everything that changes the features, as JSON."""
        return {
            "version": _VERSION,
            "network_sha256": self.sha256,
            "clips": clip_settings(self.clips),
            "resize": self.resize,
            "features": self.features,
            "precision": "fp32",
        }

    @property
    def digest(self) -> str:
        """Hash of `settings`, 16 digits."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def summary(self) -> dict[str, JSON]:
        """What is printed with every distance, as JSON."""
        return {
            "network": self.network,
            "network_sha256": self.sha256,
            "num_frames": self.clips.num_frames,
            "fps": self.clips.fps,
            "size": f"{self.clips.height}x{self.clips.width}",
            "resize": self.resize,
            "features": self.features,
            "digest": self.digest,
        }

    @property
    def text(self) -> str:
        """The same on one line."""
        rate = "as stored" if self.clips.fps is None else f"at {self.clips.fps:g} fps"
        return (
            f"{self.network} (SHA-256 {self.sha256[:12]}), {self.features}; first "
            f"{self.clips.num_frames} frames {rate}, {self.clips.height}x{self.clips.width}, "
            f"{self.resize}"
        )


class FeatureNetwork(Protocol):
    """A network whose files have been checked, but which is not loaded."""

    @property
    def protocol(self) -> FeatureProtocol:
        """What its features depend on."""

    def load(self, device: torch.device) -> FeatureFunction:
        """Load it in float32.

        The returned function raises `ValueError` if the network fails on a clip or returns
        something other than one vector; the vector may be NaN or infinite.
        """


def read_at(clips: ClipsConfig, num_frames: int) -> ClipsConfig:
    """The settings with another number of frames and one size for all clips."""
    return clips.model_copy(update={"num_frames": num_frames, "buckets": ()})
