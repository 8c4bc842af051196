"""The most salient moving region, by SAM2's own masks; one of the sources of `PromptChooser`."""

import torch

from cache_schema import JSON
from stages.clips import Clip, ClipsConfig, ClipSkipped
from stages.extract_features.encoded_frames import EncodedFrames
from stages.extract_features.prompts.chosen import ChosenPrompt
from stages.extract_features.two_way_tracking import TwoWayTracker


class AutomaticSource:
    """Picks a subject when nobody names one."""

    def __init__(self, clips: ClipsConfig) -> None:
        self._clips = clips
        self.settings: dict[str, JSON] = {"rule": 1}

    def load(self, device: torch.device) -> None:
        """Nothing is needed beside the tracker."""

    def unload(self) -> None:
        """Nothing was needed."""

    def find(self, clip: Clip, tracker: TwoWayTracker, encoded: EncodedFrames) -> ChosenPrompt:
        """The most salient moving region."""
        raise ClipSkipped("nothing_found", "not written yet")
