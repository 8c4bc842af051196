"""What choosing a prompt gives; made by every source, read by the tracking of subjects."""

from dataclasses import dataclass, field

from cache_schema import JSON
from stages.clips import SubjectPrompt
from stages.extract_features.config import PromptSource


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenPrompt:
    """A clip's subjects on one of its frames, and where that knowledge is from."""

    source: PromptSource
    frame: int = 0
    """Index of the clip's frame that the subjects are given on."""
    subjects: tuple[SubjectPrompt, ...]
    """At least one, in training-frame pixels."""
    confidence: float | None = None
    """0..1, how sure the source is; None for the dataset's, which are taken at their word."""
    detail: dict[str, JSON] = field(default_factory=dict)
    """What a reader of the store wants to know of the choice."""
