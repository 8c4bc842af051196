"""What the training step makes of the teacher's features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stages.base_facts import read_base_facts
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch
from stages.train_student.objectives.build import build_objectives
from stages.train_student.step import TrainingStep
from stages.train_student.teacher import TeacherLayout
from tests.stages.local_gram_flow.reference import kl_by_loop, similarities_by_loop

WEIGHTS = (0.7, 0.3)
"""What each of the two parts weighs in the fused similarity."""
NATIVE, LENGTH, CHANNELS = (6, 6), 3, 5


def _random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _fused(parts_THWC):
    return torch.cat(
        [w**0.5 * F.normalize(p, dim=-1) for w, p in zip(WEIGHTS, parts_THWC, strict=True)], dim=-1
    )


def _similarities_by_hand(parts_THWC, grid):
    """Mean of the parts' own similarities on the grid: each resampled alone, in float64."""
    total = 0.0
    for weight, part_THWC in zip(WEIGHTS, parts_THWC, strict=True):
        unit_TCHW = F.normalize(part_THWC.double(), dim=-1).permute(0, 3, 1, 2)
        resampled = F.interpolate(unit_TCHW, size=grid, mode="bilinear", antialias=True)
        values, inside = similarities_by_loop(resampled.permute(0, 2, 3, 1)[None].numpy(), 1)
        total = total + weight * values
    return total, inside


@pytest.fixture
def step(tiny, base_model):
    def make(layout=None, **settings):
        return TrainingStep(
            read_base_facts(base_model),
            build_objectives(TrainConfig(**settings)),
            layout=layout,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    return make


def _batch(tiny, teacher_BTHWC, valid_BT):
    latents = torch.zeros(len(teacher_BTHWC), *tiny.LATENT)
    return Batch(
        keys=("a", "b"),
        clean_BFCHW=latents,
        noise_BFCHW=latents,
        timestep_B=torch.zeros(len(latents), dtype=torch.int64),
        text_BLD=torch.zeros(len(latents), *tiny.TEXT),
        image_BFCHW=None,
        teacher={"features": teacher_BTHWC},
        teacher_valid_BT=valid_BT,
        num_frames=tiny.FRAMES,
    )


def test_features_on_sam2s_own_grid_are_compared_on_the_students(tiny, step):
    """Against each direction resampled alone and averaged in Gram-flow space, in float64.

    The second clip's last frame holds zeros and is invalid.
    """
    parts = [
        [_random(10 * clip + part, LENGTH, *NATIVE, CHANNELS) for part in range(2)]
        for clip in range(2)
    ]
    teacher_BTHWC = torch.stack([_fused(clip) for clip in parts])
    teacher_BTHWC[1, -1] = 0.0
    valid_BT = torch.ones(2, LENGTH, dtype=torch.bool)
    valid_BT[1, -1] = False
    student_BTHWC = _random(99, 2, LENGTH, *tiny.GRID, 4)

    def student(latents_BFCHW, *rest):
        return latents_BFCHW, {"lgf": student_BTHWC}

    made = step(TeacherLayout(native=True, parts=2), lgf={"radius": 1, "temperature": 0.2})
    found_B = made(student, _batch(tiny, teacher_BTHWC, valid_BT), 0).auxiliary_B["lgf"]
    student_loop, _ = similarities_by_loop(student_BTHWC.double().numpy(), 1)
    expected = []
    for clip, pairs in enumerate((LENGTH - 1, LENGTH - 2)):
        teacher_loop, inside = _similarities_by_hand(parts[clip], tiny.GRID)
        flows = [a[:, :pairs] for a in (student_loop[clip : clip + 1], teacher_loop, inside)]
        expected.append(kl_by_loop(*flows, 0.2))
    np.testing.assert_allclose(found_B.tolist(), expected, rtol=1e-4)


def test_features_on_the_students_grid_are_not_touched(tiny, step):
    features_BTHWC = _random(0, 2, LENGTH, *tiny.GRID, 4)
    valid_BT = torch.ones(2, LENGTH, dtype=torch.bool)

    def student(latents_BFCHW, *rest):
        return latents_BFCHW, {"lgf": features_BTHWC}

    losses = step(lgf={"radius": 1})(student, _batch(tiny, features_BTHWC.half(), valid_BT), 0)
    assert losses.auxiliary_B["lgf"].max() < 1e-5
