"""Boxes from words, by Grounding DINO; one of the sources of `PromptChooser`."""

import torch

from cache_schema import JSON
from stages.clips import Clip, ClipRecord, ClipSkipped
from stages.extract_features.config import GroundingConfig
from stages.extract_features.prompts.chosen import ChosenPrompt
from stages.extract_features.two_way_tracking import EncodedFrames, TwoWayTracker


def text_of(config: GroundingConfig, clip: Clip | ClipRecord) -> str | None:
    """The words to look for: the configured phrase, else the clip's own, else its caption."""
    return config.phrase or clip.phrase or clip.caption or None


class GroundingSource:
    """Grounding DINO."""

    def __init__(self, config: GroundingConfig) -> None:
        self._config = config
        self.settings: dict[str, JSON] = {"model": config.model}

    def load(self, device: torch.device) -> None:
        """Load Grounding DINO."""

    def unload(self) -> None:
        """Free it."""

    def find(self, clip: Clip, tracker: TwoWayTracker, encoded: EncodedFrames) -> ChosenPrompt:
        """The best box."""
        raise ClipSkipped("nothing_found", "not written yet")
