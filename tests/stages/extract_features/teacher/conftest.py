"""A drawn clip, ways to extract from it with the tiny SAM2, and the stock predictor's tracks."""

# Legend: T frame, C channel, H W pixels.

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from stages.clips import (
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    SubjectPrompt,
    encode_video,
    load_clip,
)
from stages.extract_features.config import ExtractConfig, Kind, TeacherConfig
from stages.extract_features.extraction import Extracted, Outcome
from stages.extract_features.teacher import extraction, stores
from stages.extract_features.teacher.extraction import SubjectExtraction
from stages.sam2_tracking.tracker import Tracker
from stages.teacher_store.config import GramFlowConfig
from tests.stages.extract_features.teacher.grid_reference import (
    RADIUS,
)

CPU = torch.device("cpu")
BOTH: tuple[Kind, ...] = ("teacher", "masks")
FLOW = GramFlowConfig(radius=RADIUS)


def entry(outcome: Outcome, kind: Kind = "teacher") -> Extracted:
    assert not isinstance(outcome, ClipSkipped), outcome
    return outcome[kind]


def skipped(outcome: Outcome) -> ClipSkipped:
    assert isinstance(outcome, ClipSkipped)
    return outcome


@pytest.fixture
def clips(two_shards: ClipsConfig) -> ClipsConfig:
    """Nine frames: three latent frames."""
    return two_shards


@pytest.fixture
def frames_THWC(clips: ClipsConfig, draw_frames: Callable[..., np.ndarray]) -> np.ndarray:
    return draw_frames(clips.num_frames, clips.height, clips.width)


@pytest.fixture
def mask_HW(clips: ClipsConfig, subject_mask: Callable[..., np.ndarray]) -> np.ndarray:
    return subject_mask(clips.height, clips.width)


@pytest.fixture
def make_record(
    frames_THWC: np.ndarray,
) -> Callable[..., ClipRecord]:
    """A record of the clip with the given prompts on frame 0 and on the last."""
    video = encode_video(frames_THWC, 8.0)

    def make(*prompts: SubjectPrompt, last: Sequence[SubjectPrompt] = (), **fields: Any) -> Any:
        return ClipRecord(
            **{"key": "clip", "video": video, **fields},
            prompts=prompts,
            last_frame_prompts=tuple(last),
        )

    return make


@pytest.fixture
def record(make_record: Callable[..., ClipRecord], mask_HW: np.ndarray) -> ClipRecord:
    return make_record(SubjectPrompt(mask_HW=mask_HW))


@pytest.fixture
def teacher(extract_config: ExtractConfig) -> TeacherConfig:
    """The tiny SAM2, prompted by the dataset alone."""
    return extract_config.teacher.model_copy(update={"prompts": ("dataset",)})


@pytest.fixture(scope="module")
def loaders() -> dict[str, Callable[..., Any]]:
    """What checks and loads SAM2, once for every configuration: tracking changes no model."""
    return {
        name: functools.cache(getattr(extraction, name))
        for name in ("check_tracker", "build_tracker")
    }


@pytest.fixture
def extract(
    teacher: TeacherConfig,
    clips: ClipsConfig,
    loaders: dict[str, Callable[..., Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[Outcome]]:
    """Runs the extraction over records in one batch, and keeps features from being rounded."""
    for name, loader in loaders.items():
        monkeypatch.setattr(extraction, name, loader)
    monkeypatch.setattr(
        stores, "encode_features", lambda values, dtype: {"features": values.numpy()}
    )

    def run(*records: ClipRecord, kinds: tuple[Kind, ...] = BOTH, **options: Any) -> list[Outcome]:
        config = teacher.model_copy(update=options)
        extraction = SubjectExtraction(config, clips, gram_flow=FLOW, kinds=kinds)
        with extraction.load_model(CPU) as opened:
            outcomes = list(opened([extraction.prepare(record) for record in records]))
        for outcome in outcomes:
            if isinstance(outcome, ClipSkipped):
                continue
            assert tuple(outcome) == kinds
            for kind, entry in outcome.items():
                specs = extraction.settings[kind].arrays
                assert {name: a.shape for name, a in entry.arrays.items()} == {
                    name: spec.shape for name, spec in specs.items()
                }
        return outcomes

    return run


@pytest.fixture
def decoded_THWC(record: ClipRecord, clips: ClipsConfig) -> np.ndarray:
    """The clip's frames as SAM2 gets them: the codec has changed what was drawn."""
    return load_clip(record, clips).frames_THWC


@pytest.fixture
def stock_tracks(
    decoded_THWC: np.ndarray, mask_HW: np.ndarray, stock: Callable[..., Any]
) -> tuple[Any, Any]:
    """What the stock predictor makes of the clip, and of its reverse from the last mask."""
    forward = stock(decoded_THWC, lambda p, state: p.add_new_mask(state, 0, 1, mask_HW))
    last = forward.last_mask()
    backward = stock(decoded_THWC[::-1], lambda p, state: p.add_new_mask(state, 0, 1, last))
    return forward, backward


@pytest.fixture
def raw_directions(
    stock_tracks: tuple[Any, Any],
) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """The stock predictor's raw features [T, C, 8, 8], forward and backward, in clip order."""

    def directions(features: str) -> tuple[np.ndarray, np.ndarray]:
        name = {
            "memory_attention": "attended",
            "memory_encoder": "memories",
            "image_encoder": "encoded",
        }[features]
        ahead, back = (
            np.stack([recorded[t].numpy() for t in sorted(recorded)])
            for recorded in (getattr(track, name) for track in stock_tracks)
        )
        return ahead, back[::-1]

    return directions


@pytest.fixture
def lose_subject(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], bool]], None]:
    """Makes the tracker see no subject where `lost(frame, frames of the pass)` says so."""

    def install(lost: Callable[[int, int], bool]) -> None:
        track = Tracker.track

        def losing(self: Tracker, requests: Any, **options: Any) -> Any:
            for frames in track(self, requests, **options):
                for frame in frames:
                    if lost(frame.index, len(requests[0].order)):
                        frame.mask_logits_HW.fill_(-1024.0)
                        frame.object_score.fill_(-4.0)
                yield frames

        monkeypatch.setattr(Tracker, "track", losing)

    return install


@pytest.fixture
def subjects(clips: ClipsConfig, mask_HW: np.ndarray) -> tuple[SubjectPrompt, SubjectPrompt]:
    """The ellipse, by its mask, and a patch of the texture, by a box."""
    box = (0.6 * clips.width, 0.1 * clips.height, 0.9 * clips.width, 0.5 * clips.height)
    return SubjectPrompt(mask_HW=mask_HW), SubjectPrompt(box_xyxy=box)
