"""The result of choosing a clip's prompt."""

from dataclasses import dataclass, field

from cache_schema import JSON
from stages.clips import SubjectPrompt
from stages.extract_features.config import PromptSource


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenPrompt:
    """Prompts for a clip's subjects on one of its frames, and their source."""

    source: PromptSource
    frame: int = 0
    """Index of the prompted frame."""
    subjects: tuple[SubjectPrompt, ...]
    """At least one, in training-frame pixels."""
    confidence: float | None = None
    """Confidence of the source, 0 to 1; None for the dataset's prompts."""
    detail: dict[str, JSON] = field(default_factory=dict)
    """Details of the choice, recorded in the store."""
