import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.local_gram_flow import gram_flow_loss, implied_flow, local_gram_flow
from tests.stages.local_gram_flow.reference import (
    flow_by_loop,
    kl_by_loop,
    l2_by_loop,
    similarities_by_loop,
)


def _features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(2, 4),
    width=st.integers(2, 5),
    radius=st.integers(1, 2),
    temperature=st.floats(0.05, 2.0),
)
def test_losses_equal_float64_loops(
    seed: int, height: int, width: int, radius: int, temperature: float
) -> None:
    student = _features(seed, 2, 3, height, width, 4)
    teacher = _features(seed + 1, 2, 3, height, width, 6)
    student_loop, inside = similarities_by_loop(student.numpy(), radius)
    teacher_loop, _ = similarities_by_loop(teacher.numpy(), radius)
    student_flow, teacher_flow = (local_gram_flow(x, radius) for x in (student, teacher))
    kl = gram_flow_loss(student_flow, teacher_flow, temperature=temperature, divergence="kl")
    l2 = gram_flow_loss(student_flow, teacher_flow, temperature=temperature, divergence="l2")
    assert kl.item() == pytest.approx(
        kl_by_loop(student_loop, teacher_loop, inside, temperature), abs=1e-10
    )
    assert l2.item() == pytest.approx(l2_by_loop(student_loop, teacher_loop, inside), abs=1e-12)


@pytest.mark.parametrize("divergence", ["kl", "l2"])
def test_loss_and_gradient_are_zero_when_student_equals_teacher(divergence: str) -> None:
    features = _features(0, 1, 3, 5, 5, 8).float().requires_grad_()
    flow = local_gram_flow(features, 2)
    loss = gram_flow_loss(flow, flow, temperature=0.1, divergence=divergence)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert features.grad.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", ["kl", "l2"])
def test_gradient_equals_finite_differences(divergence: str) -> None:
    teacher = local_gram_flow(_features(3, 1, 2, 3, 4, 5), 1)

    def loss(student: torch.Tensor) -> torch.Tensor:
        return gram_flow_loss(
            local_gram_flow(student, 1),
            teacher,
            temperature=0.5,
            divergence=divergence,  # type: ignore[arg-type]
        )

    assert torch.autograd.gradcheck(loss, _features(4, 1, 2, 3, 4, 2).requires_grad_())


@pytest.mark.parametrize("divergence", ["kl", "l2"])
def test_what_lies_outside_the_grid_never_counts(divergence: str) -> None:
    student, teacher = (local_gram_flow(_features(s, 1, 2, 3, 3, 4), 2) for s in (5, 6))
    loss = gram_flow_loss(student, teacher, temperature=0.1, divergence=divergence)  # type: ignore[arg-type]
    _, inside = similarities_by_loop(_features(5, 1, 2, 3, 3, 4).numpy(), 2)
    outside = ~torch.from_numpy(inside)
    moved = gram_flow_loss(
        student.masked_fill(outside, 7.0),
        teacher.masked_fill(outside, -3.0),
        temperature=0.1,
        divergence=divergence,  # type: ignore[arg-type]
    )
    assert moved == loss


def test_the_teacher_gets_no_gradient() -> None:
    student = _features(7, 1, 2, 3, 3, 4).requires_grad_()
    teacher = _features(8, 1, 2, 3, 3, 4).requires_grad_()
    gram_flow_loss(
        local_gram_flow(student, 1), local_gram_flow(teacher, 1), temperature=0.1, divergence="kl"
    ).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        gram_flow_loss(
            torch.zeros(1, 2, 3, 3, 9), torch.zeros(1, 3, 3, 3, 9), temperature=1, divergence="kl"
        )


def test_a_window_that_is_no_odd_square_is_refused() -> None:
    similarities = torch.zeros(1, 2, 3, 3, 16)
    with pytest.raises(ValueError, match="49 for radius 3"):
        gram_flow_loss(similarities, similarities, temperature=1, divergence="kl")


def test_implied_flow_equals_a_float64_loop() -> None:
    features = _features(9, 1, 2, 4, 5, 6)
    similarities, inside = similarities_by_loop(features.numpy(), 2)
    found = implied_flow(local_gram_flow(features, 2), 0.1)
    expected = torch.from_numpy(flow_by_loop(similarities, inside, 2, 0.1))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (-2, 0), (0, 2), (-1, 1)])
def test_tokens_that_move_imply_that_motion(dx: int, dy: int) -> None:
    first = torch.eye(64).view(1, 1, 8, 8, 64)
    features = torch.cat([first, first.roll((dy, dx), dims=(2, 3))], dim=1)
    flow = implied_flow(local_gram_flow(features, 2), 0.05)
    inner = flow[0, 0, 2:-2, 2:-2]
    torch.testing.assert_close(inner, torch.tensor([dx, dy]).float().expand_as(inner))
