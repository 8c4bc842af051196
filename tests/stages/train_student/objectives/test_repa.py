import numpy as np
import pytest
import torch

from stages.local_gram_flow import time_weights
from stages.teacher_store.features import encode_features
from stages.train_student.config import TrainConfig
from stages.train_student.model.student import Projector
from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.build import build_objectives
from stages.train_student.objectives.repa import cosine_loss

SHAPE = (2, 4, 3, 5, 6)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def by_loop(student, teacher, valid):
    losses = []
    for b in range(len(student)):
        found = [
            1 - s @ t / (np.linalg.norm(s) * np.linalg.norm(t))
            for m in range(student.shape[1])
            if valid[b, m]
            for s, t in zip(
                student[b, m].reshape(-1, student.shape[-1]).numpy(),
                teacher[b, m].reshape(-1, student.shape[-1]).numpy(),
                strict=True,
            )
        ]
        losses.append(np.mean(found) if found else 0.0)
    return losses


@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (1, 0, 0, 1), (0, 0, 0, 0)])
def test_loss_equals_a_float64_loop(kept):
    student, teacher = random(0, *SHAPE), random(1, *SHAPE)
    valid_BT = torch.tensor([[True] * 4, [bool(k) for k in kept]])
    found_B = cosine_loss(student, teacher, valid_BT)
    assert found_B.tolist() == pytest.approx(by_loop(student, teacher, valid_BT), abs=1e-12)


def test_length_does_not_count_and_opposite_is_two():
    student, valid_BT = random(0, *SHAPE), torch.ones(SHAPE[:2], dtype=torch.bool)
    torch.testing.assert_close(
        cosine_loss(student, 7 * student, valid_BT), torch.zeros(2).double(), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        cosine_loss(student, -3 * student, valid_BT), torch.full((2,), 2.0).double()
    )


@pytest.mark.parametrize("content", [0.0, float("inf"), float("nan")])
def test_invalid_maps_never_count_and_the_teacher_gets_no_gradient(content):
    valid_BT = torch.tensor([[True] * 4, [True, True, False, False]])
    away = ~valid_BT[..., None, None, None]
    student = random(0, *SHAPE).requires_grad_()
    teacher = random(1, *SHAPE).masked_fill(away, content).requires_grad_()
    loss_B = cosine_loss(student, teacher, valid_BT)
    loss_B.sum().backward()
    kept = cosine_loss(student[1:, :2], random(1, *SHAPE)[1:, :2], valid_BT[1:, :2])
    torch.testing.assert_close(loss_B[1:], kept)
    assert teacher.grad is None
    assert student.grad.isfinite().all()
    assert not student.grad[1, 2:].any()


def test_gradient_equals_finite_differences():
    teacher, valid_BT = random(1, 1, 2, 2, 2, 3), torch.tensor([[True, False]])
    student = random(0, 1, 2, 2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cosine_loss(s, teacher, valid_BT), student)


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"must have one shape .*\(2, 4, 3, 5, 5\)"):
        cosine_loss(torch.zeros(SHAPE), torch.zeros(*SHAPE[:-1], 5), torch.ones(2, 4).bool())


@pytest.mark.parametrize(("dtype", "near"), [("float16", 1e-4), ("int8", 1e-3)])
def test_every_format_of_features_teaches_the_same(dtype, near):
    features = torch.nn.functional.normalize(random(1, *SHAPE), dim=-1)
    encoded = [encode_features(clip, dtype) for clip in features]
    valid_BT = torch.ones(SHAPE[:2], dtype=torch.bool)
    teacher = Teacher(
        arrays={n: torch.from_numpy(np.stack([e[n] for e in encoded])) for n in encoded[0]},
        valid_BT=valid_BT,
        num_frames=SHAPE[1],
        token_grid=SHAPE[2:4],
    )
    (repa,) = build_objectives(TrainConfig(objectives=["repa"]))
    student = random(0, *SHAPE)
    assert repa.num_maps(4, 13) == 4
    found_B = repa(student.float(), teacher)
    np.testing.assert_allclose(found_B.tolist(), by_loop(student, features, valid_BT), atol=near)


def test_a_store_at_the_latent_rate_is_compared_token_by_token():
    """Frame 0, then means of four frames, as `extract.teacher.time_rate=latent` stores them."""
    frames = random(1, 2, 9, 3, 5, 6)
    groups = (frames[:, :1], frames[:, 1:5], frames[:, 5:])
    latents = torch.cat([group.mean(1, keepdim=True) for group in groups], 1).half().double()
    encoded = [encode_features(clip, "float16")["features"] for clip in latents]
    valid_BT = torch.tensor([[True] * 3, [True, False, True]])
    teacher = Teacher(
        arrays={"features": torch.from_numpy(np.stack(encoded))},
        valid_BT=valid_BT,
        num_frames=9,
        token_grid=(3, 5),
    )
    (repa,) = build_objectives(TrainConfig(objectives=["repa"]))
    maps = repa.num_maps(3, 9)
    assert maps == 3
    assert time_weights(maps, 9) is None  # each map has its own latent frame's tokens
    torch.manual_seed(0)
    student = Projector(16, (8, 8, 6), smooth=False)(random(0, 2, 3, 3, 5, 16).float(), None)
    found_B = repa(student, teacher)
    expected = by_loop(student.detach().double(), latents, valid_BT)
    np.testing.assert_allclose(found_B.tolist(), expected, atol=1e-6)
