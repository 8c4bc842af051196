"""Boxes from words, on the first frame where they are found; one of `PromptChooser`'s sources."""

from pathlib import Path

import torch

from cache_schema import JSON
from stages.clips import Clip, ClipRecord, ClipSkipped, SubjectPrompt
from stages.extract_features.config import GroundingConfig
from stages.extract_features.extraction import release_memory
from stages.extract_features.prompts.chosen import ChosenPrompt
from stages.extract_features.prompts.grounding_dino import (
    Detection,
    GroundingDino,
    find_grounding_dino,
    hash_of_grounding_dino,
)
from stages.extract_features.tracking.encoded_frames import EncodedFrames
from stages.extract_features.tracking.two_way_tracking import TwoWayTracker

_SAME_BOX = 0.8
"""Overlap (IoU) from which two phrases are taken to mean one subject."""


def phrases_of(config: GroundingConfig, clip: Clip | ClipRecord) -> tuple[str, ...]:
    """What to look for: the configured phrase, else the clip's own, else its caption.

    Full stops part a phrase into several subjects. A caption stays whole: its sentences are about
    one subject more often than not. Lower case, as Grounding DINO was trained. Empty when the clip
    has no words.
    """
    for text in (config.phrase, clip.phrase):
        phrases = [" ".join(part.lower().split()) for part in (text or "").split(".")]
        if any(phrases):
            return tuple(dict.fromkeys(phrase for phrase in phrases if phrase))
    caption = " ".join((clip.caption or "").lower().split()).strip(" .")
    return (caption,) if caption else ()


class GroundingSource:
    """Grounding DINO, asked frame after frame.

    Args:
        config: Which model, which words, which thresholds.

    Raises:
        ValueError: The model is missing or is something else.
    """

    def __init__(self, config: GroundingConfig) -> None:
        self._config = config
        self._folder: Path = find_grounding_dino(config)
        self._model: GroundingDino | None = None
        self.settings: dict[str, JSON] = {
            "model_sha256": hash_of_grounding_dino(self._folder),
            "phrase": config.phrase,
            "box_threshold": config.box_threshold,
            "text_threshold": config.text_threshold,
            "frame_step": config.frame_step,
        }

    def load(self, device: torch.device) -> None:
        """Load Grounding DINO."""
        self._model = GroundingDino(self._folder, device)

    def unload(self) -> None:
        """Free it."""
        self._model = None
        release_memory()

    def find(self, clip: Clip, tracker: TwoWayTracker, encoded: EncodedFrames) -> ChosenPrompt:
        """The best box of each phrase, on the first frame looked at that has any.

        Raises:
            ClipSkipped: nothing_found.
        """
        assert self._model is not None, "choose a prompt inside PromptChooser.opened"
        config = self._config
        phrases = phrases_of(config, clip)
        highest = 0.0
        looked_at = range(0, len(clip.frames_THWC), config.frame_step)
        for frame in looked_at:
            best = self._model.detect(
                clip.frames_THWC[frame], phrases, text_threshold=config.text_threshold
            )
            found = _distinct([d for d in best if d.score > config.box_threshold])
            if found:
                return _chosen(found, frame, phrases)
            highest = max([highest, *(detection.score for detection in best)])
        raise ClipSkipped(
            "nothing_found",
            f"Grounding DINO finds no {'. '.join(phrases)!r} on {len(looked_at)} frames from 0 to "
            f"{looked_at[-1]}: best score {highest:.2f}, box_threshold {config.box_threshold:g}",
        )


def _chosen(found: list[Detection], frame: int, phrases: tuple[str, ...]) -> ChosenPrompt:
    boxes: list[JSON] = [
        {
            "phrase": detection.phrase,
            "label": detection.label,
            "score": round(detection.score, 4),
            "box_xyxy": [round(edge, 2) for edge in detection.box_xyxy],
        }
        for detection in found
    ]
    return ChosenPrompt(
        source="grounding",
        frame=frame,
        subjects=tuple(SubjectPrompt(box_xyxy=detection.box_xyxy) for detection in found),
        confidence=min(detection.score for detection in found),
        detail={"phrase": ". ".join(phrases) + ".", "boxes": boxes},
    )


def _distinct(detections: list[Detection]) -> list[Detection]:
    """Without boxes that another phrase has too, with a better score; in the order given."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if all(_overlap(detection.box_xyxy, other.box_xyxy) < _SAME_BOX for other in kept):
            kept.append(detection)
    return [detection for detection in detections if detection in kept]


_Box = tuple[float, float, float, float]


def _overlap(a: _Box, b: _Box) -> float:
    """Area that two boxes share over the area that they cover together."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(a) + _area(b) - shared)


def _area(box: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
