"""Records of a dataset, decoded clips, and the outcomes of loading."""

from dataclasses import dataclass

import numpy as np

from stages.clips.geometry import FrameGeometry
from stages.clips.prompts import SubjectPrompt
from stages.clips.video_source import VideoSource

# Legend: T frame, H W pixels, C colour (RGB).


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipRecord:
    """One clip of the dataset, not decoded; prompts in source pixels."""

    key: str
    """Unique in the dataset; never used as a path."""
    video: VideoSource
    caption: str | None = None
    prompts: tuple[SubjectPrompt, ...] = ()
    """The subjects on frame 0, one prompt each."""
    last_frame_prompts: tuple[SubjectPrompt, ...] = ()
    """The same subjects on the last training frame, index num_frames - 1 after sampling."""
    phrase: str | None = None
    """Phrase that describes the subject for grounding, such as "the brown bear"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRecord:
    """An invalid entry of the dataset and the reason; it must be recorded, never dropped."""

    key: str
    """Unique in the dataset, like a clip's; an entry with a duplicate key gets a suffix."""
    reason: str
    """bad_record or bad_prompt."""
    detail: str


class ClipSkipped(Exception):  # noqa: N818 - an outcome that callers record, not a failure
    """A clip that cannot be used.

    Attributes:
        reason: A slug. From loading: undecodable, too_short, fps_too_low; callers add their own,
            such as no_prompt, bad_prompt and no_caption.
        detail: One-line explanation.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clip:
    """A decoded clip at the training size, rate and length; prompts in training-frame pixels."""

    key: str
    frames_THWC: np.ndarray
    """uint8 [num_frames, height, width, 3], RGB."""
    geometry: FrameGeometry
    caption: str | None = None
    prompts: tuple[SubjectPrompt, ...] = ()
    """The subjects within the crop on frame 0."""
    last_frame_prompts: tuple[SubjectPrompt, ...] = ()
    """The subjects within the crop on frame num_frames - 1."""
    phrase: str | None = None
    """Phrase that describes the subject."""
    prompt_problem: str | None = None
    """Why `prompts` is empty although the dataset has prompts for this clip; otherwise None."""
