"""Choice among prompt sources, fallback, and the recorded reason if none succeeds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stages.clips import Clip, ClipRecord, ClipSkipped, SubjectPrompt
from stages.extract_features.config import GroundingConfig, PromptSource, TeacherConfig
from stages.extract_features.prompts import (
    ChosenPrompt,
    PromptChooser,
    check_prompt,
    usable_sources,
)
from stages.extract_features.prompts.automatic import AutomaticSource
from stages.extract_features.prompts.grounding import GroundingSource
from tests.stages.extract_features.prompts.noise_clip import make_clip

MakeChooser = Callable[..., PromptChooser]
CPU = torch.device("cpu")
NOT_NEEDED: Any = None
TRACKER: Any = SimpleNamespace(model=SimpleNamespace(image_size=64, device=CPU))
BOX = SubjectPrompt(box_xyxy=(10.0, 10.0, 30.0, 30.0))
ALL: tuple[PromptSource, ...] = ("dataset", "grounding", "automatic")


@pytest.fixture
def make_chooser(tiny_grounding: Path) -> MakeChooser:
    def make(*sources: PromptSource, fallback: bool = False, **grounding: Any) -> PromptChooser:
        config = TeacherConfig(
            prompts=sources,
            prompt_fallback=fallback,
            image_size=64,
            grounding=GroundingConfig(
                model=str(tiny_grounding), **{"box_threshold": 0.0, **grounding}
            ),
        )
        return PromptChooser(config)

    return make


@pytest.fixture(autouse=True)
def automatic_finds(monkeypatch: pytest.MonkeyPatch) -> ChosenPrompt:
    """What the automatic source finds here; it is tested on its own."""
    chosen = ChosenPrompt(source="automatic", subjects=(BOX,), confidence=0.5)
    monkeypatch.setattr(AutomaticSource, "find", lambda *_: chosen)
    return chosen


def choose(chooser: PromptChooser, clip: Clip) -> ChosenPrompt:
    with chooser.load_models(CPU):
        return chooser.choose(clip, TRACKER, NOT_NEEDED)


def test_the_datasets_prompts_are_taken_as_they_are(make_chooser: MakeChooser) -> None:
    mask_HW = np.zeros((48, 64), dtype=bool)
    mask_HW[5:20, 5:20] = True
    subjects = (BOX, SubjectPrompt(mask_HW=mask_HW))
    chosen = choose(make_chooser("dataset"), make_clip(prompts=subjects))
    assert (chosen.source, chosen.frame, chosen.confidence) == ("dataset", 0, None)
    assert all(given is taken for given, taken in zip(subjects, chosen.subjects, strict=True))


def test_the_first_source_with_anything_to_go_by_decides(make_chooser: MakeChooser) -> None:
    chooser = make_chooser(*ALL)
    assert choose(chooser, make_clip(prompts=(BOX,), phrase="a dog")).source == "dataset"
    assert choose(chooser, make_clip(phrase="a dog")).source == "grounding"
    assert choose(chooser, make_clip()).source == "automatic"
    other_order = make_chooser("automatic", "dataset")
    assert choose(other_order, make_clip(prompts=(BOX,))).source == "automatic"


def test_a_source_that_finds_nothing_is_a_skip_unless_there_is_a_fallback(
    make_chooser: MakeChooser,
) -> None:
    clip = make_clip(caption="a dog")
    with pytest.raises(ClipSkipped, match="nothing_found: Grounding DINO"):
        choose(make_chooser(*ALL, box_threshold=1.0), clip)
    assert choose(make_chooser(*ALL, box_threshold=1.0, fallback=True), clip).source == "automatic"


def test_subjects_that_the_crop_cut_away_are_a_bad_prompt_unless_there_is_a_fallback(
    make_chooser: MakeChooser,
) -> None:
    clip = make_clip(prompt_problem="the box lies outside the centre crop")
    with pytest.raises(ClipSkipped, match="bad_prompt: the box lies outside"):
        choose(make_chooser("dataset", "automatic"), clip)
    chooser = make_chooser("dataset", "automatic", fallback=True)
    assert choose(chooser, clip).source == "automatic"


def test_masks_that_vanish_at_sam2s_size_are_dropped_and_alone_a_bad_prompt() -> None:
    config = TeacherConfig(prompts=("dataset",), image_size=64)
    speck_HW = np.zeros((480, 640), dtype=bool)
    speck_HW[100, 100] = True
    speck = SubjectPrompt(mask_HW=speck_HW)
    chooser = PromptChooser(config)
    assert choose(chooser, make_clip(prompts=(speck, BOX))).subjects == (BOX,)
    with pytest.raises(ClipSkipped, match="bad_prompt: the mask vanishes"):
        choose(chooser, make_clip(prompts=(speck,)))


def test_when_every_source_fails_all_reasons_are_told(make_chooser: MakeChooser) -> None:
    chooser = make_chooser("dataset", "grounding", fallback=True, box_threshold=1.0)
    clip = make_clip(prompt_problem="outside the crop", phrase="a dog")
    with pytest.raises(ClipSkipped, match=r"dataset: outside the crop; grounding: .*'a dog'"):
        choose(chooser, clip)


@pytest.mark.parametrize(
    ("sources", "missing"),
    [
        (("dataset",), "no mask, box or points"),
        (("dataset", "grounding"), "no mask, box or points and no subject phrase or caption"),
    ],
)
def test_a_clip_that_gives_nothing_to_go_by_has_no_prompt(
    sources: tuple[PromptSource, ...], missing: str, make_chooser: MakeChooser
) -> None:
    chooser = make_chooser(*sources, fallback=True)
    for nothing in (make_clip(), ClipRecord(key="a", video=b"")):
        with pytest.raises(ClipSkipped, match=f"no_prompt: the dataset gives {missing} for"):
            check_prompt(TeacherConfig(prompts=sources, prompt_fallback=True), nothing)
    with pytest.raises(ClipSkipped, match="no_prompt"):
        choose(chooser, make_clip())


def test_what_can_be_known_unseen_is_refused_before_any_work() -> None:
    clip = make_clip(prompt_problem="outside the crop")
    with pytest.raises(ClipSkipped, match="bad_prompt: outside the crop"):
        check_prompt(TeacherConfig(prompts=("dataset",), prompt_fallback=True), clip)
    two = TeacherConfig(prompts=("dataset", "automatic"), prompt_fallback=True)
    check_prompt(two, clip)
    check_prompt(TeacherConfig(prompts=("automatic", "dataset")), clip)


def test_a_record_tells_which_sources_can_serve_it() -> None:
    config = TeacherConfig(prompts=ALL)
    record = ClipRecord(key="a", video=b"", caption="a dog")
    assert usable_sources(config, record) == ("grounding", "automatic")
    assert usable_sources(config, ClipRecord(key="a", video=b"", prompts=(BOX,))) == (
        "dataset",
        "automatic",
    )
    assert usable_sources(TeacherConfig(prompts=("dataset",)), record) == ()


def test_settings_hold_what_decides_and_nothing_else(
    make_chooser: MakeChooser, tiny_grounding: Path
) -> None:
    assert make_chooser("dataset").settings == {"sources": ["dataset"], "fallback": False}
    assert make_chooser("dataset", fallback=True).settings["fallback"] is False
    settings: Any = make_chooser(*ALL, phrase="a dog").settings
    assert settings["sources"] == list(ALL)
    assert settings["grounding"]["phrase"] == "a dog"
    assert settings["automatic"]["rule"] == 1
    assert str(tiny_grounding) not in str(settings)
    assert settings != make_chooser(*ALL, phrase="a dog", box_threshold=0.1).settings


def test_grounding_dino_is_there_inside_opened_alone(
    make_chooser: MakeChooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def loaded(*_: object) -> Iterator[None]:
        events.append("load")
        try:
            yield
        finally:
            events.append("free")

    monkeypatch.setattr(GroundingSource, "loaded", loaded)
    with pytest.raises(KeyError), make_chooser(*ALL).load_models(CPU):
        assert events == ["load"]
        raise KeyError
    assert events == ["load", "free"]


def test_a_grounding_model_that_is_missing_is_refused_at_once(tmp_path: Path) -> None:
    grounding = GroundingConfig(model=str(tmp_path))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        PromptChooser(TeacherConfig(prompts=("grounding",), grounding=grounding))
    PromptChooser(TeacherConfig(prompts=("dataset",), grounding=grounding))
