"""What a dataset holds and what loading makes of it; the vocabulary of `stages.clips`."""

from dataclasses import dataclass

import numpy as np

from stages.clips.geometry import FrameGeometry
from stages.clips.prompts import SubjectPrompt
from stages.clips.video_source import VideoSource

# Legend: T frame, H W pixels, C colour (RGB).


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipRecord:
    """One clip as the dataset has it: nothing decoded, prompts in source pixels."""

    key: str
    """Unique in the dataset; never used as a path."""
    video: VideoSource
    caption: str | None = None
    prompts: tuple[SubjectPrompt, ...] = ()
    """The subjects on frame 0, one prompt each."""
    last_frame_prompts: tuple[SubjectPrompt, ...] = ()
    """The same subjects on the last training frame, index num_frames - 1 after sampling."""
    phrase: str | None = None
    """Words for the subject, such as "the brown bear"; what grounding looks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRecord:
    """An entry of the dataset that is no clip, and why; to be recorded, never dropped."""

    key: str
    """Unique in the dataset, like a clip's; a second entry under a taken key gets a suffix."""
    reason: str
    """bad_record or bad_prompt."""
    detail: str


class ClipSkipped(Exception):  # noqa: N818 - an outcome that callers record, not a failure
    """A clip that cannot be used.

    Attributes:
        reason: A slug. From loading: undecodable, too_short, fps_too_low; callers add their own,
            such as no_prompt, bad_prompt and no_caption.
        detail: One line for people.
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
    """The subjects on frame 0 that the crop left."""
    last_frame_prompts: tuple[SubjectPrompt, ...] = ()
    """The subjects on frame num_frames - 1 that the crop left."""
    phrase: str | None = None
    """Words for the subject."""
    prompt_problem: str | None = None
    """Why `prompts` is empty although the dataset gives some; None when it gives none, or when
    some are left."""
