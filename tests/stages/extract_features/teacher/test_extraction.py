"""Teacher features and masks against the stock predictor; alignment and fusion in float64."""

# Legend: T frame, C channel, H W grid or pixels, G fused channel, S similarities of one direction.

from collections.abc import Callable
from pathlib import Path
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
)
from stages.extract_features.config import TeacherConfig
from stages.extract_features.extraction import Outcome
from stages.extract_features.teacher.extraction import SubjectExtraction
from stages.local_gram_flow import local_gram_flow, neighbour_mask
from tests.stages.extract_features.teacher.conftest import BOTH, CPU, FLOW, entry
from tests.stages.extract_features.teacher.grid_reference import (
    RADIUS,
    gram_flow,
    latent_means,
    on_grid,
)


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


@pytest.mark.parametrize(("fusion", "time_rate"), [("gram_flow", "frame"), ("average", "latent")])
def test_image_encoder_features_have_the_stock_encoders_gram_flow(
    fusion: str,
    time_rate: str,
    clips: ClipsConfig,
    record: ClipRecord,
    extract: Callable[..., list[Outcome]],
    raw_directions: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> None:
    (outcome,) = extract(record, features="image_encoder", fusion=fusion, time_rate=time_rate)
    encoded, from_reversed_clip = raw_directions("image_encoder")
    np.testing.assert_allclose(encoded, from_reversed_clip, atol=5e-6)
    expected = on_grid(encoded, *clips.token_grid)
    if time_rate == "latent":
        expected = latent_means(expected)
    features = entry(outcome).arrays["features"]
    assert features.shape[-1] == (2 if fusion == "gram_flow" else 1) * encoded.shape[1]
    got = gram_flow(features.astype(np.float64))
    np.testing.assert_allclose(got, gram_flow(expected), atol=5e-6)
    assert set(entry(outcome, "masks").arrays) == {"forward", "backward", "valid"}


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


@pytest.mark.parametrize(
    ("option", "value"), [("min_cycle_consistency", 0.5), ("backward_prompt", "dataset")]
)
def test_options_of_a_backward_pass_that_there_is_not_are_refused(
    teacher: TeacherConfig, clips: ClipsConfig, option: str, value: object
) -> None:
    config = teacher.model_copy(update={"fusion": "forward", option: value})
    with pytest.raises(ValueError, match=rf"{option}=.*fusion=forward"):
        SubjectExtraction(config, clips, gram_flow=FLOW, kinds=BOTH)


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
