"""Teacher features against the stock predictor: alignment and fusion, written out in float64."""

# Legend: T frame, C channel, H W grid, S similarities of one direction.

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
    load_clip,
)
from stages.extract_features import teacher
from stages.extract_features.config import ExtractConfig, TeacherConfig
from stages.extract_features.teacher import TeacherExtraction
from stages.local_gram_flow import local_gram_flow, neighbour_mask

CPU = torch.device("cpu")
RADIUS = 2


def on_grid(raw_TCHW: np.ndarray, height: int, width: int) -> np.ndarray:
    """[T, height, width, C] in float64: bilinear at cell centres, antialiased by a triangle as wide
    as a target cell where the grid gets coarser, renormalised at the edges.
    """

    def weights(source: int, target: int) -> np.ndarray:
        scale = source / target
        support = max(scale, 1.0)
        centres = (np.arange(target) + 0.5) * scale
        distance = np.abs(centres[:, None] - (np.arange(source) + 0.5)[None]) / support
        triangle = np.clip(1 - distance, 0, None)
        return triangle / triangle.sum(axis=1, keepdims=True)

    rows, columns = weights(raw_TCHW.shape[2], height), weights(raw_TCHW.shape[3], width)
    return np.einsum("yh,xw,tchw->tyxc", rows, columns, raw_TCHW.astype(np.float64))


def gram_flow(features_THWC: np.ndarray) -> np.ndarray:
    """Products of unit tokens with the next frame's neighbours, by loops; 0 outside the grid."""
    unit = features_THWC / np.linalg.norm(features_THWC, axis=-1, keepdims=True)
    frames, height, width, _ = unit.shape
    side = 2 * RADIUS + 1
    flow = np.zeros((frames - 1, height, width, side * side))
    for t, y, x, k in np.ndindex(flow.shape):
        ny, nx = y + k // side - RADIUS, x + k % side - RADIUS
        if 0 <= ny < height and 0 <= nx < width:
            flow[t, y, x, k] = unit[t, y, x] @ unit[t + 1, ny, nx]
    return flow


def latent_means(features_THWC: np.ndarray) -> np.ndarray:
    groups = [[0]] + [
        list(range(4 * k - 3, 4 * k + 1)) for k in range(1, len(features_THWC) // 4 + 1)
    ]
    return np.stack([features_THWC[group].mean(axis=0) for group in groups])


@pytest.fixture
def clips(two_shards: ClipsConfig) -> ClipsConfig:
    """Nine frames: three latent frames."""
    return two_shards


@pytest.fixture
def record(
    clips: ClipsConfig,
    draw_frames: Callable[..., np.ndarray],
    subject_mask: Callable[..., np.ndarray],
) -> ClipRecord:
    size = clips.height, clips.width
    return ClipRecord(
        key="clip",
        video=encode_video(draw_frames(clips.num_frames, *size), 8.0),
        caption=None,
        prompt=SubjectPrompt(mask_HW=subject_mask(*size)),
    )


@pytest.fixture
def raw_directions(
    record: ClipRecord, clips: ClipsConfig, stock: Callable[..., Any]
) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """The stock predictor's raw features [T, C, 8, 8], forward and backward, in clip order."""
    clip = load_clip(record, clips)
    assert clip.prompt is not None
    mask_HW = clip.prompt.mask_HW
    forward = stock(clip.frames_THWC, lambda p, state: p.add_new_mask(state, 0, 1, mask_HW))
    last = forward.last_mask()
    backward = stock(clip.frames_THWC[::-1], lambda p, state: p.add_new_mask(state, 0, 1, last))

    def directions(features: str) -> tuple[np.ndarray, np.ndarray]:
        name = {"memory_attention": "attended", "memory_encoder": "memories"}[features]
        order = range(clips.num_frames)
        ahead, back = (
            np.stack([getattr(track, name)[t].numpy() for t in order])
            for track in (forward, backward)
        )
        return ahead, back[::-1]

    return directions


def extract_exactly(
    config: TeacherConfig,
    clips: ClipsConfig,
    record: ClipRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> np.ndarray:
    """The features before they are rounded to float16."""
    monkeypatch.setattr(teacher, "to_float16", lambda values: values.numpy())
    extraction = TeacherExtraction(config, clips)
    with extraction.opened(CPU) as extract:
        features_THWG = extract(extraction.prepare(record)).arrays["features"]
    assert features_THWG.shape == extraction.settings.arrays["features"].shape
    return features_THWG


@pytest.mark.parametrize("features", ["memory_attention", "memory_encoder"])
@pytest.mark.parametrize("time_rate", ["frame", "latent"])
def test_the_fused_gram_flow_is_the_weighted_sum_of_the_stock_directions(
    features: str,
    time_rate: str,
    extract_config: ExtractConfig,
    clips: ClipsConfig,
    record: ClipRecord,
    raw_directions: Callable[[str], tuple[np.ndarray, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share = 0.3
    config = extract_config.teacher.model_copy(
        update={"features": features, "time_rate": time_rate, "forward_weight": share}
    )
    fused_THWG = extract_exactly(config, clips, record, monkeypatch)

    directions = [on_grid(raw, *clips.token_grid) for raw in raw_directions(features)]
    if time_rate == "latent":
        directions = [latent_means(direction) for direction in directions]
    forward_S, backward_S = (gram_flow(direction) for direction in directions)
    expected = share * forward_S + (1 - share) * backward_S
    assert np.abs(forward_S - backward_S).max() > 1e-3  # the two directions do differ
    np.testing.assert_allclose(gram_flow(fused_THWG.astype(np.float64)), expected, atol=5e-6)
    ours = local_gram_flow(torch.from_numpy(fused_THWG)[None], RADIUS)[0]
    inside = neighbour_mask(*clips.token_grid, RADIUS)
    np.testing.assert_allclose(np.where(inside, ours, 0), np.where(inside, expected, 0), atol=5e-6)


def test_stored_features_keep_the_gram_flow(
    extract_config: ExtractConfig,
    clips: ClipsConfig,
    record: ClipRecord,
    raw_directions: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> None:
    extraction = TeacherExtraction(extract_config.teacher, clips)
    with extraction.opened(CPU) as extract:
        stored = extract(extraction.prepare(record)).arrays["features"]
    assert stored.dtype == np.float16
    forward_S, backward_S = (
        gram_flow(on_grid(raw, *clips.token_grid)) for raw in raw_directions("memory_attention")
    )
    expected = (forward_S + backward_S) / 2
    np.testing.assert_allclose(gram_flow(stored.astype(np.float64)), expected, atol=5e-4)


@pytest.mark.parametrize("fusion", ["average", "forward"])
def test_the_ablations_hold_what_they_are_named_after(
    fusion: str,
    extract_config: ExtractConfig,
    clips: ClipsConfig,
    record: ClipRecord,
    raw_directions: Callable[[str], tuple[np.ndarray, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = extract_config.teacher.model_copy(update={"fusion": fusion, "forward_weight": 0.3})
    got = extract_exactly(config, clips, record, monkeypatch)
    forward, backward = (
        direction / np.linalg.norm(direction, axis=-1, keepdims=True)
        for direction in (
            on_grid(raw, *clips.token_grid) for raw in raw_directions("memory_attention")
        )
    )
    expected = forward if fusion == "forward" else 0.3 * forward + 0.7 * backward
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_a_clip_without_prompt_is_skipped_before_it_is_decoded(
    extract_config: ExtractConfig, clips: ClipsConfig
) -> None:
    extraction = TeacherExtraction(extract_config.teacher, clips)
    record = ClipRecord(key="a", video=Path("absent.mp4"), caption=None, prompt=None)
    with pytest.raises(ClipSkipped, match="no_prompt"):
        extraction.prepare(record)


def test_a_lost_subject_is_skipped_unless_only_the_forward_track_counts(
    extract_config: ExtractConfig,
    clips: ClipsConfig,
    record: ClipRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = TeacherExtraction._build

    def blind(self: TeacherExtraction, device: torch.device) -> Any:
        model = build(self, device)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(-100.0)
        return model

    monkeypatch.setattr(TeacherExtraction, "_build", blind)
    for fusion in ("gram_flow", "forward"):
        config = extract_config.teacher.model_copy(update={"fusion": fusion})
        extraction = TeacherExtraction(config, clips)
        with extraction.opened(CPU) as extract:
            prepared = extraction.prepare(record)
            if fusion == "forward":
                assert np.isfinite(extract(prepared).arrays["features"]).all()
            else:
                with pytest.raises(ClipSkipped, match=r"subject_lost: .* on frame 8"):
                    extract(prepared)


def test_a_mask_that_vanishes_at_sam2s_size_is_skipped(
    extract_config: ExtractConfig, clips: ClipsConfig, record: ClipRecord
) -> None:
    config = extract_config.teacher.model_copy(update={"image_size": 64})
    dot_HW = np.zeros((clips.height, clips.width), dtype=bool)
    dot_HW[10, 10] = True
    extraction = TeacherExtraction(config, clips)
    dotted = ClipRecord(
        key="dot", video=record.video, caption=None, prompt=SubjectPrompt(mask_HW=dot_HW)
    )
    with extraction.opened(CPU) as extract, pytest.raises(ClipSkipped, match="bad_prompt"):
        extract(extraction.prepare(dotted))
