"""Settings of the teacher and masks stores, and arrays computed from synthetic tracks."""

# Legend: T frame, H W grid or mask, C channel.

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import StoreSettings
from stages.clips import ClipsConfig
from stages.extract_features.config import TeacherConfig
from stages.extract_features.teacher.stores import (
    mask_arrays,
    masks_settings,
    teacher_arrays,
    teacher_settings,
    tracking_settings,
)
from stages.extract_features.teacher.two_way import SubjectTrack, Track
from tests.stages.extract_features.teacher.grid_reference import on_grid


@pytest.fixture
def clips() -> ClipsConfig:
    """Nine frames: three latent frames."""
    return ClipsConfig(path=Path("absent"), num_frames=9, height=64, width=96, fps=8.0)


def settings(config: TeacherConfig, clips: ClipsConfig) -> tuple[StoreSettings, StoreSettings]:
    tracking = tracking_settings(
        config,
        clips,
        checkpoint_sha256="0" * 64,
        library="sam2",
        architecture={"model": "tiny"},
        prompts={},
    )
    teacher = teacher_settings(config, clips, tracking, channels=32, stride=16)
    return teacher, masks_settings(config, clips, tracking)


@pytest.mark.parametrize(
    ("options", "teacher_changes", "masks_change"),
    [
        ({"clips_per_batch": 4, "frames_per_batch": 2, "compile": True}, False, False),
        ({"forward_weight": 0.3}, True, False),
        ({"fusion": "average"}, True, False),
        ({"features": "memory_encoder"}, True, False),
        ({"features": "image_encoder"}, True, False),
        ({"time_rate": "latent"}, True, False),
        ({"grid": "native"}, True, False),
        ({"max_subjects": 2}, False, False),
        ({"subjects": "each"}, True, True),
        ({"fusion": "forward"}, True, True),
        ({"min_cycle_consistency": 0.5}, True, True),
        ({"backward_prompt": "dataset"}, True, True),
        ({"precision": "bf16"}, True, True),
        ({"image_size": 64}, True, True),
    ],
)
def test_settings_change_with_what_changes_the_store(
    options: dict[str, Any], teacher_changes: bool, masks_change: bool, clips: ClipsConfig
) -> None:
    plain = settings(TeacherConfig(), clips)
    changed = settings(TeacherConfig(**options), clips)
    differ = [one.hash != other.hash for one, other in zip(plain, changed, strict=True)]
    assert differ == [teacher_changes, masks_change]


@pytest.mark.parametrize(
    ("fusion", "subjects", "parts"),
    [("gram_flow", "union", 2), ("average", "union", 1), ("gram_flow", "each", 8)],
)
def test_the_teacher_store_says_how_it_is_laid_out(
    fusion: Any, subjects: Any, parts: int, clips: ClipsConfig
) -> None:
    config = TeacherConfig(fusion=fusion, subjects=subjects, grid="native", image_size=128)
    teacher, masks = settings(config, clips)
    assert teacher.values["parts"] == parts
    assert (teacher.values["grid"], teacher.values["grid_source"]) == ([8, 8], "native")
    assert teacher.arrays["features"].shape == (9, 8, 8, 32 * parts)
    assert teacher.arrays["valid"].shape == (9,)
    assert masks.arrays["forward"].shape == (9, 16, 24)


def tracks_of(
    visited: Sequence[Sequence[bool]], seen: Sequence[Sequence[bool]]
) -> tuple[SubjectTrack, ...]:
    """A subject per row, tracked forward alone over nine frames; random features and masks."""
    noise = torch.Generator().manual_seed(0)
    return tuple(
        SubjectTrack(
            first_frame=0,
            last_frame=8,
            forward=Track(
                visited_T=torch.tensor(went),
                seen_T=torch.tensor(saw),
                logits_THW=torch.randn(9, 32, 32, generator=noise),
                features_THWC=torch.randn(9, 4, 6, 32, generator=noise),
            ),
            backward=None,
            backward_prompt=None,
            cycle_consistency=None,
        )
        for went, saw in zip(visited, seen, strict=True)
    )


def test_a_map_counts_where_every_subject_was_seen_on_all_its_frames() -> None:
    config = TeacherConfig(fusion="forward", subjects="each", time_rate="latent")
    first = [True] * 9
    second = [True, True, False, True, True, True, True, True, True]
    arrays = teacher_arrays(tracks_of((first, first), (first, second)), config)
    assert arrays["valid"].tolist() == [1, 0, 1]
    assert arrays["features"].any(axis=(1, 2, 3)).all()
    unvisited = teacher_arrays(tracks_of((first, second), (first, second)), config)
    assert unvisited["valid"].tolist() == [1, 0, 1]
    assert unvisited["features"].any(axis=(1, 2, 3)).tolist() == [True, False, True]


def test_a_mask_holds_the_likeliest_of_the_subjects_that_were_tracked_there(
    clips: ClipsConfig,
) -> None:
    always, never_on_4 = [True] * 9, [True] * 4 + [False] + [True] * 4
    tracks = tracks_of((always, never_on_4), (always, never_on_4))
    arrays = mask_arrays(tracks, clips)
    assert arrays["valid"].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1]
    for t in range(9):
        tracked = [track for track in tracks if track.forward.visited_T[t]]
        logits = np.max([track.forward.logits_THW[t].numpy() for track in tracked], axis=0)
        probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
        expected = 255 * on_grid(probability[None, None], 16, 24)[0, ..., 0]
        assert np.abs(arrays["forward"][t] - expected).max() <= 0.5 + 1e-3
