"""A clip's prompt: as its source found it, and converted for SAM2."""

from dataclasses import dataclass, field, replace
from typing import Self

from cache_schema import JSON
from stages.clips import Clip, ClipSkipped, SubjectPrompt
from stages.extract_features.config import PromptSource
from stages.sam2_tracking.inputs import Sam2Prompt, prompt_for_sam2
from stages.sam2_tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenPrompt:
    """Prompts for a clip's subjects on one of its frames, and their source."""

    source: PromptSource
    frame: int = 0
    """Index of the prompted frame."""
    subjects: tuple[SubjectPrompt, ...]
    """At least one, in training-frame pixels."""
    sam2_prompts: tuple[Sam2Prompt, ...] = ()
    """The same for SAM2, one per subject; empty as returned by a source."""
    confidence: float | None = None
    """Confidence of the source, 0 to 1; None for the dataset's prompts."""
    detail: dict[str, JSON] = field(default_factory=dict)
    """Details of the choice, recorded in the store."""

    def converted(self, clip: Clip, tracker: Tracker) -> Self:
        """Return a copy with `sam2_prompts`, without subjects that vanish at SAM2's size.

        Raises:
            ClipSkipped: bad_prompt, if no subject is left.
        """
        kept: list[tuple[SubjectPrompt, Sam2Prompt]] = []
        vanished = None
        for subject in self.subjects:
            try:
                kept.append((subject, convert_prompt(subject, clip, tracker)))
            except ClipSkipped as skipped:
                vanished = skipped
        if vanished is not None and not kept:
            raise vanished
        subjects, sam2_prompts = zip(*kept, strict=True)
        return replace(self, subjects=subjects, sam2_prompts=sam2_prompts)


def convert_prompt(subject: SubjectPrompt, clip: Clip, tracker: Tracker) -> Sam2Prompt:
    """Convert a prompt on one of the clip's frames, on the tracker's device.

    Raises:
        ClipSkipped: bad_prompt, if the mask is empty at SAM2's size.
    """
    height, width = clip.frames_THWC.shape[1:3]
    model = tracker.model
    return prompt_for_sam2(
        subject, height=height, width=width, image_size=model.image_size, device=model.device
    )
