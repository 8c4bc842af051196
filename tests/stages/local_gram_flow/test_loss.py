from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.local_gram_flow import (
    flow_entropy,
    gram_flow_loss,
    implied_flow,
    implied_motion,
    local_gram_flow,
)
from tests.stages.local_gram_flow.reference import (
    entropy_by_loop,
    flow_by_loop,
    kl_by_loop,
    l2_by_loop,
    similarities_by_loop,
)

LOSSES_BY_LOOP: dict[str, Callable[..., float]] = {
    "kl": partial(kl_by_loop, temperature=0.3),
    "l2": l2_by_loop,
}


def _features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@settings(max_examples=25)
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
    assert kl.shape == (2,)
    assert kl.mean().item() == pytest.approx(
        kl_by_loop(student_loop, teacher_loop, inside, temperature), abs=1e-10
    )
    assert l2.mean().item() == pytest.approx(
        l2_by_loop(student_loop, teacher_loop, inside), abs=1e-12
    )


@pytest.mark.parametrize("divergence", ["kl", "l2"])
def test_loss_and_gradient_are_zero_when_student_equals_teacher(divergence: str) -> None:
    features = _features(0, 1, 3, 5, 5, 8).float().requires_grad_()
    flow = local_gram_flow(features, 2)
    loss = gram_flow_loss(flow, flow, temperature=0.1, divergence=divergence)  # type: ignore[arg-type]
    loss.sum().backward()
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
    ).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), divergence=st.sampled_from(["kl", "l2"]), data=st.data())
def test_only_valid_pairs_count_each_clip_alike(
    seed: int, divergence: str, data: st.DataObject
) -> None:
    """Against the loop over each valid pair alone: a clip's mean."""
    pairs = st.lists(st.booleans(), min_size=3, max_size=3)
    valid = data.draw(st.lists(pairs, min_size=2, max_size=2))
    student, teacher = _features(seed, 2, 4, 3, 4, 4), _features(seed + 1, 2, 4, 3, 4, 6)
    (student_loop, inside), (teacher_loop, _) = (
        similarities_by_loop(features.numpy(), 1) for features in (student, teacher)
    )
    by_loop = LOSSES_BY_LOOP[divergence]
    per_clip = []
    for b, valid_P in enumerate(valid):
        per_pair = []
        for p in (p for p, counts in enumerate(valid_P) if counts):
            one = [a[b : b + 1, p : p + 1] for a in (student_loop, teacher_loop, inside)]
            per_pair.append(by_loop(*one))
        per_clip.append(sum(per_pair) / max(len(per_pair), 1))
    found = gram_flow_loss(
        local_gram_flow(student, 1),
        local_gram_flow(teacher, 1),
        temperature=0.3,
        divergence=divergence,  # type: ignore[arg-type]
        valid_BP=torch.tensor(valid),
    )
    assert found.tolist() == pytest.approx(per_clip, abs=1e-10)


def _with_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor,
    valid: torch.Tensor | None,
    divergence: str,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the clips, and its gradient."""
    student = student.clone().requires_grad_()
    loss = gram_flow_loss(
        local_gram_flow(student, 1),
        local_gram_flow(teacher, 1),
        temperature=0.1,
        divergence=divergence,  # type: ignore[arg-type]
        valid_BP=valid,
        token_weight_BPHW=weight,
    ).mean()
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad


@pytest.mark.parametrize("divergence", ["kl", "l2"])
@pytest.mark.parametrize("content", [0.0, 6e4, 1e30, float("inf"), float("nan")])
def test_what_invalid_frames_hold_changes_neither_loss_nor_gradient(
    divergence: str, content: float
) -> None:
    student, teacher = _features(11, 2, 4, 3, 4, 5).float(), _features(12, 2, 4, 3, 4, 6).float()
    valid_BT = torch.tensor([[True, True, True, False], [False, False, False, True]])
    valid_BP = valid_BT[:, :-1] & valid_BT[:, 1:]
    expected, expected_gradient = _with_gradient(student, teacher, valid_BP, divergence)
    spoiled = teacher.masked_fill(~valid_BT[:, :, None, None, None], content)
    loss, gradient = _with_gradient(student, spoiled, valid_BP, divergence)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)
    assert gradient[0].abs().sum() > 0
    assert not gradient[1].any(), "a clip without a valid pair teaches nothing"
    assert not gradient[0, 3].any()


@pytest.mark.parametrize("divergence", ["kl", "l2"])
def test_all_pairs_valid_is_no_mask(divergence: str) -> None:
    student, teacher = _features(13, 2, 3, 3, 4, 5), _features(14, 2, 3, 3, 4, 6)
    masked = _with_gradient(student, teacher, torch.ones(2, 2, dtype=torch.bool), divergence)
    plain = _with_gradient(student, teacher, None, divergence)
    torch.testing.assert_close(masked, plain, rtol=1e-12, atol=1e-14)


def test_a_batch_in_pieces_has_the_mean_of_their_losses() -> None:
    student, teacher = _features(15, 3, 4, 3, 4, 5), _features(16, 3, 4, 3, 4, 6)
    valid = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    whole, gradient = _with_gradient(student, teacher, valid, "kl")
    pieces = [
        _with_gradient(student[b : b + 1], teacher[b : b + 1], valid[b : b + 1], "kl")
        for b in range(3)
    ]
    torch.testing.assert_close(whole, torch.stack([loss for loss, _ in pieces]).mean())
    torch.testing.assert_close(gradient, torch.cat([grad for _, grad in pieces]) / 3)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), divergence=st.sampled_from(["kl", "l2"]), data=st.data())
def test_a_weighted_loss_is_the_weighted_mean_over_the_tokens_of_valid_pairs(
    seed: int, divergence: str, data: st.DataObject
) -> None:
    """Against the loop over each token alone, in float64."""
    pairs = st.lists(st.booleans(), min_size=2, max_size=2)
    valid = data.draw(st.lists(pairs, min_size=2, max_size=2))
    student, teacher = _features(seed, 2, 3, 2, 3, 4), _features(seed + 1, 2, 3, 2, 3, 6)
    weight = _features(seed + 2, 2, 2, 2, 3).abs()
    (student_loop, inside), (teacher_loop, _) = (
        similarities_by_loop(features.numpy(), 1) for features in (student, teacher)
    )
    by_loop = LOSSES_BY_LOOP[divergence]
    expected = []
    for b, valid_P in enumerate(valid):
        total = over = 0.0
        for p, y, x in np.ndindex(2, 2, 3):
            place = tuple(slice(i, i + 1) for i in (b, p, y, x))
            one = [array[place] for array in (student_loop, teacher_loop, inside)]
            loss = by_loop(*one)
            total += valid_P[p] * float(weight[b, p, y, x]) * loss
            over += valid_P[p] * float(weight[b, p, y, x])
        expected.append(total / over if over else 0.0)
    found = gram_flow_loss(
        local_gram_flow(student, 1),
        local_gram_flow(teacher, 1),
        temperature=0.3,
        divergence=divergence,  # type: ignore[arg-type]
        valid_BP=torch.tensor(valid),
        token_weight_BPHW=weight,
    )
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("divergence", ["kl", "l2"])
@pytest.mark.parametrize("valid", [None, torch.tensor([[True, False, True]] * 2)])
def test_equal_weights_are_no_weights(divergence: str, valid: torch.Tensor | None) -> None:
    student, teacher = _features(17, 2, 4, 3, 4, 5), _features(18, 2, 4, 3, 4, 5)
    weight = torch.full((2, 3, 3, 4), 0.2)
    weighted = _with_gradient(student, teacher, valid, divergence, weight)
    plain = _with_gradient(student, teacher, valid, divergence)
    torch.testing.assert_close(weighted, plain, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("content", [float("inf"), float("nan")])
def test_weights_of_invalid_pairs_never_count(content: float) -> None:
    student, teacher = _features(19, 1, 4, 3, 4, 5), _features(20, 1, 4, 3, 4, 5)
    valid = torch.tensor([[True, False, True]])
    weight = _features(21, 1, 3, 3, 4).abs()
    spoiled = weight.masked_fill(~valid[..., None, None], content)
    expected = _with_gradient(student, teacher, valid, "kl", weight)
    found = _with_gradient(student, teacher, valid, "kl", spoiled)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_weights_of_another_shape_are_refused() -> None:
    flow = torch.zeros(1, 2, 3, 3, 9)
    with pytest.raises(ValueError, match=r"must be \(1, 2, 3, 3\), one for each"):
        gram_flow_loss(
            flow, flow, temperature=1, divergence="kl", token_weight_BPHW=torch.ones(1, 3, 3, 3)
        )


@pytest.mark.parametrize("valid", [torch.ones(1, 2), torch.ones(1, 3, dtype=torch.bool)])
def test_a_mask_of_another_shape_or_type_is_refused(valid: torch.Tensor) -> None:
    flow = torch.zeros(1, 2, 3, 3, 9)
    with pytest.raises(ValueError, match=r"valid_BP must be bool \(1, 2\)"):
        gram_flow_loss(flow, flow, temperature=1, divergence="kl", valid_BP=valid)


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


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 4),
    width=st.integers(2, 5),
    temperature=st.floats(0.02, 2.0),
)
def test_entropy_equals_a_float64_loop(
    seed: int, height: int, width: int, temperature: float
) -> None:
    features = _features(seed, 2, 3, height, width, 4)
    found = flow_entropy(local_gram_flow(features, radius=1), temperature)
    expected = entropy_by_loop(*similarities_by_loop(features.numpy(), 1), temperature)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_entropy_is_1_for_equal_tokens_and_0_for_a_certain_match() -> None:
    same = flow_entropy(local_gram_flow(torch.ones(1, 2, 3, 4, 5), radius=1), 0.1)
    torch.testing.assert_close(same, torch.ones_like(same))
    different = torch.eye(12).reshape(1, 1, 3, 4, 12).expand(-1, 2, -1, -1, -1)
    assert flow_entropy(local_gram_flow(different, radius=1), 0.01).max() < 1e-6


def test_entropy_of_a_single_neighbour_is_0() -> None:
    assert flow_entropy(local_gram_flow(torch.ones(1, 2, 1, 1, 3), radius=1), 0.1).tolist() == [
        [[[0.0]]]
    ]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), radius=st.integers(1, 2), temperature=st.floats(0.02, 2.0))
def test_a_still_video_of_any_features_implies_no_motion(
    seed: int, radius: int, temperature: float
) -> None:
    still = _features(seed, 1, 1, 5, 6, 4).expand(-1, 3, -1, -1, -1)
    similarities = local_gram_flow(still, radius)
    torch.testing.assert_close(
        implied_motion(similarities, temperature), torch.zeros(1, 2, 5, 6, 2), rtol=0, atol=1e-5
    )
    inner = implied_flow(similarities, 1.0)[..., 1:-1, 1:-1, :]
    assert inner.abs().max() > 1e-4, "the expected offset alone is biased by the frame's content"


def test_motion_by_whole_tokens_is_implied_exactly() -> None:
    world = torch.randn(1, 12, 14, 32, generator=torch.Generator().manual_seed(0))
    moving = torch.stack([world[:, 2 - t : 10 - t, 1 + t : 11 + t] for t in range(3)], dim=1)
    motion = implied_motion(local_gram_flow(moving, 2), 0.01)[..., 2:-2, 2:-2, :]
    # The window moves up and to the right over the world, so the content goes down and left.
    expected = torch.tensor([-1.0, 1.0]).expand_as(motion)
    torch.testing.assert_close(motion, expected, rtol=0, atol=1e-3)


def test_reversed_pairs_imply_the_opposite_motion() -> None:
    features = _features(3, 1, 3, 5, 6, 4)
    forward = implied_motion(local_gram_flow(features, 1), 0.2)
    backward = implied_motion(local_gram_flow(features.flip(1), 1), 0.2)
    torch.testing.assert_close(forward, -backward.flip(1), rtol=0, atol=1e-5)
