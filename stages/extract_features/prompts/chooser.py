"""Choice of a clip's prompt from the configured sources, in order."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch

from cache_schema import JSON
from stages.clips import Clip, ClipRecord, ClipSkipped
from stages.extract_features.config import PromptSource, TeacherConfig
from stages.extract_features.prompts.automatic import AutomaticSource
from stages.extract_features.prompts.grounding import GroundingSource, phrases_of
from stages.extract_features.prompts.prompt import ChosenPrompt
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.tracker import Tracker


class _Source(Protocol):
    """A source of prompts."""

    settings: dict[str, JSON]

    def find(self, clip: Clip, tracker: Tracker, encoded: EncodedFrames) -> ChosenPrompt:
        """Return the clip's prompt, in training-frame pixels.

        Raises:
            ClipSkipped: bad_prompt or nothing_found.
        """


def usable_sources(config: TeacherConfig, clip: Clip | ClipRecord) -> tuple[PromptSource, ...]:
    """Return the sources, in order, that have input for this clip; if empty, it has no prompt.

    The dataset source needs a mask, a box or points; grounding needs a phrase or a caption; the
    automatic source needs only the video.
    """
    has_material: dict[PromptSource, bool] = {
        "dataset": bool(clip.prompts) or _prompt_problem(clip) is not None,
        "grounding": bool(phrases_of(config.grounding, clip)),
        "automatic": True,
    }
    return tuple(source for source in config.prompts if has_material[source])


def check_prompt(config: TeacherConfig, clip: Clip | ClipRecord) -> None:
    """Raise in advance for a clip that `PromptChooser.choose` would skip without looking at it.

    A record shows whether a source has input; a decoded clip, whether the crop left any of it.

    Raises:
        ClipSkipped: no_prompt, or bad_prompt.
    """
    usable = usable_sources(config, clip)
    if not usable:
        raise ClipSkipped("no_prompt", _nothing_given(config.prompts))
    is_last_resort = not config.prompt_fallback or len(usable) == 1
    problem = _prompt_problem(clip)
    if usable[0] == "dataset" and is_last_resort and problem is not None:
        raise ClipSkipped("bad_prompt", problem)


class PromptChooser:
    """The configured sources of prompts.

    Args:
        config: Sources, their order, and their settings.

    Raises:
        ValueError: Grounding DINO is configured, but is missing or is another model.
    """

    settings: dict[str, JSON]
    """Settings that determine prompts, recorded in a store's settings."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._sources = {source: _make_source(source, config) for source in config.prompts}
        self.settings = {
            "sources": list(config.prompts),
            "fallback": config.prompt_fallback and len(config.prompts) > 1,
            **{name: source.settings for name, source in self._sources.items() if source.settings},
        }

    @contextmanager
    def load_models(self, device: torch.device) -> Iterator[None]:
        """Load the models that the sources need besides SAM2; call `choose` inside the context."""
        with ExitStack() as stack:
            for source in self._sources.values():
                if isinstance(source, GroundingSource):
                    stack.enter_context(source.loaded(device))
            yield

    def choose(self, clip: Clip, tracker: Tracker, encoded: EncodedFrames) -> ChosenPrompt:
        """Choose the prompt from the first source with input for the clip, and convert it for SAM2.

        With `prompt_fallback`, from the first such source that finds something.

        Args:
            clip: The clip at the training size.
            tracker: Tracker for the automatic source, which uses SAM2's mask proposals.
            encoded: The clip's encoded frames.

        Raises:
            ClipSkipped: no_prompt, bad_prompt or nothing_found.
        """
        check_prompt(self._config, clip)
        failures: list[tuple[PromptSource, ClipSkipped]] = []
        for name in usable_sources(self._config, clip):
            try:
                found = self._sources[name].find(clip, tracker, encoded)
                return found.converted(clip, tracker)
            except ClipSkipped as skipped:
                if not self._config.prompt_fallback:
                    raise
                failures.append((name, skipped))
        raise ClipSkipped(
            failures[-1][1].reason,
            "; ".join(f"{name}: {skipped.detail}" for name, skipped in failures),
        )


class DatasetSource:
    """The dataset's own mask, box or points on frame 0."""

    settings: dict[str, JSON] = {}  # noqa: RUF012 - nothing to set

    def find(self, clip: Clip, tracker: Tracker, encoded: EncodedFrames) -> ChosenPrompt:
        """Return the prompts that the crop has left.

        Raises:
            ClipSkipped: bad_prompt, if there are none.
        """
        if not clip.prompts:
            raise ClipSkipped("bad_prompt", str(clip.prompt_problem))
        return ChosenPrompt(source="dataset", subjects=clip.prompts)


def _prompt_problem(clip: Clip | ClipRecord) -> str | None:
    """Return why no dataset prompt is usable; None for a record, where it is not known yet."""
    return clip.prompt_problem if isinstance(clip, Clip) else None


def _make_source(source: PromptSource, config: TeacherConfig) -> _Source:
    if source == "dataset":
        return DatasetSource()
    if source == "grounding":
        return GroundingSource(config.grounding)
    return AutomaticSource(config.image_size)


def _nothing_given(sources: tuple[PromptSource, ...]) -> str:
    wanted = {
        "dataset": "no mask, box or points",
        "grounding": "no subject phrase or caption",
        "automatic": "",
    }
    missing = " and ".join(wanted[source] for source in sources if wanted[source])
    return f"the dataset gives {missing} for this clip"
