"""Teacher features and masks against the stock predictor; alignment and fusion in float64."""

# Legend: T frame, C channel, H W grid or pixels, G fused channel, S similarities of one direction.

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.clips import (
    Clip,
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    SubjectPrompt,
    encode_video,
    load_clip,
)
from stages.extract_features.config import ExtractConfig, Kind, TeacherConfig
from stages.extract_features.extraction import Extracted, Outcome
from stages.extract_features.prompts import ChosenPrompt, PromptChooser
from stages.extract_features.teacher import extraction, stores
from stages.extract_features.teacher.extraction import SubjectExtraction
from stages.local_gram_flow import local_gram_flow, neighbour_mask
from stages.sam2_tracking.tracker import Tracker
from stages.teacher_store.config import GramFlowConfig
from tests.stages.extract_features.teacher.grid_reference import (
    RADIUS,
    gram_flow,
    latent_means,
    on_grid,
)

CPU = torch.device("cpu")
BOTH: tuple[Kind, ...] = ("teacher", "masks")
FLOW = GramFlowConfig(radius=RADIUS)


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
        name: functools.cache(getattr(extraction, name)) for name in ("check_sam2", "build_sam2")
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


def entry(outcome: Outcome, kind: Kind = "teacher") -> Extracted:
    assert not isinstance(outcome, ClipSkipped), outcome
    return outcome[kind]


def skipped(outcome: Outcome) -> ClipSkipped:
    assert isinstance(outcome, ClipSkipped)
    return outcome


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
        name = {"memory_attention": "attended", "memory_encoder": "memories"}[features]
        ahead, back = (
            np.stack([recorded[t].numpy() for t in sorted(recorded)])
            for recorded in (getattr(track, name) for track in stock_tracks)
        )
        return ahead, back[::-1]

    return directions


@pytest.mark.parametrize(
    ("features", "time_rate", "grid"),
    [
        ("memory_attention", "frame", "student"),
        ("memory_attention", "latent", "native"),
        ("memory_encoder", "latent", "student"),
        ("memory_encoder", "frame", "native"),
    ],
)
def test_the_fused_gram_flow_is_the_weighted_sum_of_the_stock_directions(
    features: str,
    time_rate: str,
    grid: str,
    clips: ClipsConfig,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
    raw_directions: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> None:
    share = 0.3
    (outcome,) = extract(
        record, features=features, time_rate=time_rate, grid=grid, forward_weight=share
    )
    arrays = entry(outcome).arrays
    assert arrays["valid"].all()

    height, width = clips.token_grid if grid == "student" else (8, 8)
    directions = [on_grid(raw, height, width) for raw in raw_directions(features)]
    if time_rate == "latent":
        directions = [latent_means(direction) for direction in directions]
    forward_S, backward_S = (gram_flow(direction) for direction in directions)
    expected = share * forward_S + (1 - share) * backward_S
    assert np.abs(forward_S - backward_S).max() > 1e-3  # the two directions do differ
    got = gram_flow(arrays["features"].astype(np.float64))
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_the_project_gram_flow_of_stored_features_agrees_within_float16(
    teacher: TeacherConfig,
    clips: ClipsConfig,
    record: ClipRecord,
    raw_directions: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> None:
    extraction = SubjectExtraction(teacher, clips, gram_flow=FLOW, kinds=("teacher",))
    with extraction.load_model(CPU) as opened:
        (outcome,) = opened([extraction.prepare(record)])
    features_THWG = entry(outcome).arrays["features"]
    assert features_THWG.dtype == np.float16
    flow = local_gram_flow(torch.from_numpy(features_THWG)[None], RADIUS)[0].numpy()
    inside = neighbour_mask(*clips.token_grid, RADIUS).numpy()
    forward_S, backward_S = (
        gram_flow(on_grid(raw, *clips.token_grid)) for raw in raw_directions("memory_attention")
    )
    expected = 0.5 * forward_S + 0.5 * backward_S
    np.testing.assert_allclose(flow[:, inside], expected[:, inside], atol=2e-3)


@pytest.mark.parametrize("fusion", ["average", "forward"])
def test_the_ablations_store_unit_tokens_of_one_direction_or_the_mean(
    fusion: str,
    clips: ClipsConfig,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
    raw_directions: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> None:
    (outcome,) = extract(record, fusion=fusion, forward_weight=0.3)
    forward, backward = (
        direction / np.linalg.norm(direction, axis=-1, keepdims=True)
        for direction in (
            on_grid(raw, *clips.token_grid) for raw in raw_directions("memory_attention")
        )
    )
    expected = forward if fusion == "forward" else 0.3 * forward + 0.7 * backward
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(entry(outcome).arrays["features"], expected, atol=5e-6)
    assert ("backward" in entry(outcome, "masks").arrays) == (fusion == "average")
    assert (entry(outcome).attributes["quality"] is None) == (fusion == "forward")


def test_masks_are_the_stock_predictors_at_a_quarter_of_the_frame(
    clips: ClipsConfig,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
    stock_tracks: tuple[Any, Any],
) -> None:
    (outcome,) = extract(record, kinds=("masks",))
    arrays = entry(outcome, "masks").arrays
    size = clips.height // 4, clips.width // 4
    binary = []
    for name, track in zip(("forward", "backward"), stock_tracks, strict=True):
        logits = np.stack([track.logits[t].numpy() for t in sorted(track.logits)])
        logits = logits if name == "forward" else logits[::-1]
        probability = 1 / (1 + np.exp(-logits[:, None].astype(np.float64)))
        expected = 255 * on_grid(probability, *size)[..., 0]
        assert np.abs(arrays[name] - expected).max() <= 0.5 + 1e-3
        binary.append(logits > 0)
    overlap = [(f & b).sum() / (f | b).sum() for f, b in zip(*binary, strict=True)]
    consistency = entry(outcome, "masks").attributes["quality"]
    assert consistency == pytest.approx(np.mean(overlap), abs=1e-6)
    assert arrays["valid"].tolist() == [1] * clips.num_frames


def test_a_clip_without_prompt_is_skipped_before_it_is_decoded(
    teacher: TeacherConfig, clips: ClipsConfig
) -> None:
    extraction = SubjectExtraction(teacher, clips, gram_flow=FLOW, kinds=BOTH)
    with pytest.raises(ClipSkipped, match="no_prompt"):
        extraction.prepare(ClipRecord(key="a", video=Path("absent.mp4")))


def test_a_mask_that_vanishes_at_sam2s_size_is_skipped(
    make_record: Callable[..., ClipRecord],
    extract: Callable[..., list[Outcome]],
    record: ClipRecord,
    clips: ClipsConfig,
) -> None:
    dot_HW = np.zeros((clips.height, clips.width), dtype=bool)
    dot_HW[10, 10] = True
    dotted = make_record(SubjectPrompt(mask_HW=dot_HW))
    outcomes = extract(dotted, record, image_size=64)
    assert skipped(outcomes[0]).reason == "bad_prompt"
    assert entry(outcomes[1]).arrays["valid"].all()  # the other clip of the batch is not disturbed


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


@pytest.mark.parametrize("time_rate", ["frame", "latent"])
def test_frames_after_the_subject_is_lost_are_invalid_and_hold_zeros(
    time_rate: str,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
    lose_subject: Callable[[Callable[[int, int], bool]], None],
) -> None:
    lose_subject(lambda frame, _: frame == 2 or frame > 6)
    (outcome,) = extract(record, time_rate=time_rate)
    valid = [1, 1, 0, 1, 1, 1, 1, 0, 0]
    visited = [True] * 7 + [False] * 2
    attributes = entry(outcome).attributes
    assert (attributes["first_frame"], attributes["last_frame"]) == (0, 6)
    assert (attributes["lost_at"], attributes["valid_frames"]) == (7, 6)
    masks = entry(outcome, "masks").arrays
    assert masks["valid"].tolist() == valid
    assert not masks["forward"][[2, 7, 8]].any() and not masks["backward"][7:].any()
    teacher = entry(outcome).arrays
    if time_rate == "latent":  # frame 0; 1 to 4; 5 to 8
        valid, visited = [1, 0, 0], [True, True, False]
    assert teacher["valid"].tolist() == valid
    norms_THW = np.linalg.norm(teacher["features"], axis=-1)
    expected_THW = np.asarray(visited)[:, None, None] * np.ones(norms_THW.shape)
    np.testing.assert_allclose(norms_THW, expected_THW, atol=1e-5)


@pytest.mark.parametrize("fusion", ["gram_flow", "forward"])
def test_a_clip_without_two_neighbouring_valid_frames_is_skipped_and_says_where(
    fusion: str,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
    lose_subject: Callable[[Callable[[int, int], bool]], None],
) -> None:
    lose_subject(lambda frame, _: frame not in (0, 3))
    outcome = skipped(extract(record, fusion=fusion)[0])
    assert outcome.reason == "subject_lost"
    assert "2 of 9 frames, no two of them neighbours" in outcome.detail
    assert "last on frame 3" in outcome.detail


def test_a_clip_whose_directions_disagree_is_skipped_when_that_is_asked(
    record: ClipRecord, extract: Callable[..., list[Outcome]]
) -> None:
    (kept,) = extract(record)
    consistency = entry(kept).attributes["quality"]
    assert isinstance(consistency, float) and 0 < consistency < 1
    (just_kept,) = extract(record, min_cycle_consistency=consistency)
    assert not isinstance(just_kept, ClipSkipped)
    outcome = skipped(extract(record, min_cycle_consistency=min(1.0, consistency + 1e-3))[0])
    assert outcome.reason == "inconsistent" and f"{consistency:.3f}" in outcome.detail


@pytest.mark.parametrize(
    ("option", "value"), [("min_cycle_consistency", 0.5), ("backward_prompt", "dataset")]
)
def test_options_of_a_backward_pass_that_there_is_not_are_refused(
    teacher: TeacherConfig, clips: ClipsConfig, option: str, value: object
) -> None:
    config = teacher.model_copy(update={"fusion": "forward", option: value})
    with pytest.raises(ValueError, match=rf"{option}=.*fusion=forward"):
        SubjectExtraction(config, clips, gram_flow=FLOW, kinds=BOTH)


@pytest.fixture
def subjects(clips: ClipsConfig, mask_HW: np.ndarray) -> tuple[SubjectPrompt, SubjectPrompt]:
    """The ellipse, by its mask, and a patch of the texture, by a box."""
    box = (0.6 * clips.width, 0.1 * clips.height, 0.9 * clips.width, 0.5 * clips.height)
    return SubjectPrompt(mask_HW=mask_HW), SubjectPrompt(box_xyxy=box)


def test_each_subject_is_tracked_by_itself_and_averaged_in_gram_flow_space(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    extract: Callable[..., list[Outcome]],
) -> None:
    (outcome,) = extract(make_record(*subjects), subjects="each", max_subjects=3)
    alone = [entry(extract(make_record(subject))[0]) for subject in subjects]
    together = entry(outcome)
    width = alone[0].arrays["features"].shape[-1]
    assert together.arrays["features"].shape[-1] == 3 * width
    assert not together.arrays["features"][..., 2 * width :].any()
    flows = [gram_flow(one.arrays["features"].astype(np.float64)) for one in alone]
    assert np.abs(flows[0] - flows[1]).max() > 1e-3
    got = gram_flow(together.arrays["features"].astype(np.float64))
    np.testing.assert_allclose(got, (flows[0] + flows[1]) / 2, atol=5e-6)
    consistencies = [one.attributes["quality"] for one in alone]
    assert together.attributes["quality"] == pytest.approx(np.mean(consistencies))
    prompt = together.attributes["prompt"]
    assert isinstance(prompt, dict)
    assert (prompt["subjects"], prompt["kinds"]) == (2, ["mask", "box"])


def test_masks_of_each_subject_are_joined(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    extract: Callable[..., list[Outcome]],
) -> None:
    (outcome,) = extract(make_record(*subjects), subjects="each", kinds=("masks",))
    alone = [
        entry(extract(make_record(subject), kinds=("masks",))[0], "masks") for subject in subjects
    ]
    for name in ("forward", "backward"):
        likeliest = np.maximum(*(one.arrays[name] for one in alone)).astype(int)
        got = entry(outcome, "masks").arrays[name].astype(int)
        # Equal but where both subjects reach into one mask pixel.
        assert (got >= likeliest - 1).all() and (np.abs(got - likeliest) <= 1).mean() > 0.9


def test_more_subjects_than_there_is_room_for_are_skipped(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    extract: Callable[..., list[Outcome]],
) -> None:
    outcome = skipped(extract(make_record(*subjects), subjects="each", max_subjects=1)[0])
    assert outcome.reason == "too_many_subjects" and outcome.detail.startswith("2 subjects")


def test_a_lost_subject_among_several_is_named(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    extract: Callable[..., list[Outcome]],
    lose_subject: Callable[[Callable[[int, int], bool]], None],
) -> None:
    steps = iter(range(1000))
    lose_subject(lambda *_: next(steps) >= 9)  # the second forward track is the second pass
    outcome = skipped(extract(make_record(*subjects), subjects="each")[0])
    assert outcome.reason == "subject_lost"
    assert outcome.detail == "subject 2 of 2: the forward track, from frame 0, sees it nowhere"


def test_the_union_of_masks_is_tracked_as_one_mask(
    make_record: Callable[..., ClipRecord],
    mask_HW: np.ndarray,
    extract: Callable[..., list[Outcome]],
) -> None:
    left_HW, right_HW = mask_HW.copy(), mask_HW.copy()
    middle = int(np.nonzero(mask_HW.any(axis=0))[0].mean())
    left_HW[:, middle:], right_HW[:, :middle] = False, False
    halves = make_record(SubjectPrompt(mask_HW=left_HW), SubjectPrompt(mask_HW=right_HW))
    whole = make_record(SubjectPrompt(mask_HW=mask_HW))
    joined, single = (entry(extract(record)[0]) for record in (halves, whole))
    # The halves meet in a mask of a quarter of SAM2's resolution: one pixel off in places.
    got, expected = (
        gram_flow(one.arrays["features"].astype(np.float64)) for one in (joined, single)
    )
    assert np.abs(got - expected).mean() < 0.01
    prompt = joined.attributes["prompt"]
    assert isinstance(prompt, dict) and prompt["subjects"] == 2


def test_a_batch_of_clips_equals_clip_by_clip(
    make_record: Callable[..., ClipRecord],
    subjects: tuple[SubjectPrompt, SubjectPrompt],
    draw_frames: Callable[..., np.ndarray],
    clips: ClipsConfig,
    extract: Callable[..., list[Outcome]],
) -> None:
    other = encode_video(draw_frames(clips.num_frames, clips.height, clips.width, seed=3), 8.0)
    records = [
        make_record(subjects[0]),
        make_record(subjects[1], video=other),
        make_record(*subjects, video=other),
    ]
    together = extract(*records, subjects="each", max_subjects=2, clips_per_batch=3)
    for record, outcome in zip(records, together, strict=True):
        (alone,) = extract(record, subjects="each", max_subjects=2)
        for kind in BOTH:
            one, expected = entry(outcome, kind), entry(alone, kind)
            for name in expected.arrays:
                tolerance = 1 if name in ("forward", "backward") else 5e-6
                np.testing.assert_allclose(
                    one.arrays[name].astype(float),
                    expected.arrays[name].astype(float),
                    atol=tolerance,
                )
            assert one.attributes["prompt"] == expected.attributes["prompt"]


def test_the_datasets_prompt_for_the_last_frame_starts_the_backward_track(
    make_record: Callable[..., ClipRecord],
    decoded_THWC: np.ndarray,
    mask_HW: np.ndarray,
    subject_mask: Callable[..., np.ndarray],
    clips: ClipsConfig,
    extract: Callable[..., list[Outcome]],
    stock: Callable[..., Any],
) -> None:
    last_HW = subject_mask(clips.height, clips.width, shift=0.01 * (clips.num_frames - 1))
    record = make_record(SubjectPrompt(mask_HW=mask_HW), last=[SubjectPrompt(mask_HW=last_HW)])
    (outcome,) = extract(record, backward_prompt="dataset")
    backward = stock(decoded_THWC[::-1], lambda p, state: p.add_new_mask(state, 0, 1, last_HW))
    raw_TCHW = np.stack([backward.attended[t].numpy() for t in sorted(backward.attended)])[::-1]
    direction = on_grid(raw_TCHW, *clips.token_grid)
    features = entry(outcome).arrays["features"]
    got = features[..., features.shape[-1] // 2 :].astype(np.float64)
    np.testing.assert_allclose(gram_flow(got), gram_flow(direction), atol=5e-6)
    prompt = entry(outcome).attributes["prompt"]
    assert isinstance(prompt, dict) and prompt["backward"] == "dataset"


def test_a_prompt_on_a_later_frame_is_tracked_both_ways_from_there(
    make_record: Callable[..., ClipRecord],
    subject_mask: Callable[..., np.ndarray],
    clips: ClipsConfig,
    extract: Callable[..., list[Outcome]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = SubjectPrompt(mask_HW=subject_mask(clips.height, clips.width, shift=0.04))

    def choose(_: PromptChooser, clip: Clip, tracker: Tracker, encoded: object) -> ChosenPrompt:
        return ChosenPrompt(
            source="grounding", frame=4, subjects=(there,), confidence=0.6, detail={"phrase": "it"}
        ).converted(clip, tracker)

    monkeypatch.setattr(PromptChooser, "choose", choose)
    (outcome,) = extract(make_record(there))
    stored = entry(outcome)
    assert stored.arrays["valid"].all() and stored.attributes["first_frame"] == 0
    assert stored.attributes["prompt"] == {
        "source": "grounding",
        "kinds": ["mask"],
        "frame": 4,
        "subjects": 1,
        "confidence": 0.6,
        "phrase": "it",
        "backward": "track",
    }


@pytest.mark.parametrize("keep_encoded", ["host", "disk"])
def test_where_frames_wait_changes_nothing(
    keep_encoded: str,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
) -> None:
    (plain,), (elsewhere,) = extract(record), extract(record, keep_encoded=keep_encoded)
    for kind in BOTH:
        for name, array in entry(plain, kind).arrays.items():
            np.testing.assert_array_equal(entry(elsewhere, kind).arrays[name], array)


def test_settings_hold_what_the_models_and_the_prompts_are(
    teacher: TeacherConfig, clips: ClipsConfig, tmp_path: Path
) -> None:
    def settings(**options: Any) -> Any:
        config = teacher.model_copy(update=options)
        return SubjectExtraction(config, clips, gram_flow=FLOW, kinds=("masks",)).settings["masks"]

    plain = settings()
    weights = torch.load(teacher.checkpoint, weights_only=True)
    weights["model"]["no_mem_embed"] += 1
    torch.save(weights, tmp_path / "other.pt")
    for options in (
        {"checkpoint": str(tmp_path / "other.pt")},
        {"image_size": 64},
        {"prompts": ("dataset", "automatic")},
    ):
        assert settings(**options).hash != plain.hash, options
