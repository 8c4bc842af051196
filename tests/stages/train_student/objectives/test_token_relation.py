import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.train_student.config import TrainConfig
from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.build import build_objectives
from stages.train_student.objectives.token_relation import token_relation_loss


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def pooled_by_loop(clip_THWC, pool):
    T, H, W, C = clip_THWC.shape
    out = np.zeros((T, -(-H // pool), -(-W // pool), C))
    for t, y, x in np.ndindex(out.shape[:3]):
        square = clip_THWC[t, y * pool : (y + 1) * pool, x * pool : (x + 1) * pool]
        out[t, y, x] = square.reshape(-1, C).mean(0)
    return out


def by_matrix(student, teacher, valid, margin, pool, student_pool=None):
    """The whole matrix of each clip's valid tokens at once, in float64."""
    pools = (student_pool or pool, pool)
    losses = []
    for b in range(len(student)):
        matrices = []
        for features, side in zip((student, teacher), pools, strict=True):
            tokens = pooled_by_loop(features[b].numpy(), side)[valid[b].numpy()]
            tokens = tokens.reshape(-1, tokens.shape[-1])
            tokens = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
            matrices.append(tokens @ tokens.T)
        excess = np.maximum(0.0, np.abs(matrices[0] - matrices[1]) - margin)
        losses.append(excess.mean() if excess.size else 0.0)
    return losses


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    pool=st.integers(1, 3),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
    valid=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_loss_equals_the_full_matrix_in_float64(seed, grid, pool, margin, valid):
    student, teacher = random(seed, 2, 3, *grid, 4), random(seed + 1, 2, 3, *grid, 7)
    valid_BL = torch.tensor([[True] * 3, valid])
    found_B = token_relation_loss(student, teacher, valid_BL, margin=margin, pool=pool)
    expected = by_matrix(student, teacher, valid_BL, margin, pool)
    assert found_B.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_gradient_made_map_by_map_is_that_of_the_full_matrix():
    student, teacher = random(0, 1, 3, 4, 5, 6).requires_grad_(), random(1, 1, 3, 4, 5, 6)
    valid_BL = torch.tensor([[True, False, True]])
    token_relation_loss(student, teacher, valid_BL, margin=0.1, pool=2).sum().backward()
    whole = student.detach()[:, [0, 2]].requires_grad_()
    unit = []
    for features in (whole, teacher[:, [0, 2]]):
        maps = features[0].permute(0, 3, 1, 2)
        squares = [maps[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2, 4)]
        tokens = torch.stack(squares, 1).flatten(0, 1)
        unit.append(tokens / tokens.norm(dim=-1, keepdim=True))
    difference = unit[0] @ unit[0].T - unit[1] @ unit[1].T
    (difference.abs() - 0.1).clamp(min=0).mean().backward()
    torch.testing.assert_close(student.grad[:, [0, 2]], whole.grad, rtol=1e-10, atol=1e-14)
    assert not student.grad[:, 1].any()


def test_the_whole_matrix_is_never_kept():
    """What the graph holds for the backward pass grows with the tokens, not with their square."""
    saved = []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    student = random(0, 1, 6, 8, 8, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = token_relation_loss(
            student, random(1, 1, 6, 8, 8, 4), torch.ones(1, 6).bool(), margin=0.1, pool=1
        )
    assert max(saved) <= student.numel()
    loss.sum().backward()


def test_zero_for_a_rotation_of_the_teacher_and_within_the_margin():
    """Relations know no axes; and what differs less than the margin is no loss."""
    teacher, valid = random(0, 1, 2, 2, 3, 4), torch.ones(1, 2).bool()
    turn = torch.linalg.qr(random(1, 4, 4))[0]
    turned = token_relation_loss(teacher @ turn, teacher, valid, margin=0.0, pool=1)
    assert turned.item() < 1e-12
    near = teacher + 1e-3 * random(2, *teacher.shape)
    assert token_relation_loss(near, teacher, valid, margin=0.1, pool=1).item() == 0.0
    assert token_relation_loss(near, teacher, valid, margin=0.0, pool=1).item() > 0.0


@pytest.mark.parametrize("content", [0.0, float("inf"), float("nan")])
def test_what_invalid_maps_hold_never_counts(content):
    valid_BL = torch.tensor([[True, True, False], [False, False, False]])
    away = ~valid_BL[..., None, None, None]
    student = random(0, 2, 3, 2, 3, 4).requires_grad_()
    teacher = random(1, 2, 3, 2, 3, 4).masked_fill(away, content)
    loss_B = token_relation_loss(
        student.masked_fill(away, content), teacher, valid_BL, margin=0.0, pool=1
    )
    loss_B.sum().backward()
    kept = token_relation_loss(
        student[:1, :2], teacher[:1, :2], valid_BL[:1, :2], margin=0.0, pool=1
    )
    torch.testing.assert_close(loss_B[:1], kept)
    assert loss_B[1].item() == 0.0
    assert student.grad.isfinite().all()
    assert student.grad[0, :2].abs().sum() > 0
    assert not student.grad[1].any()


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"same tokens .*\(1, 2, 3, 3\) and \(1, 2, 3, 4\)"):
        token_relation_loss(
            torch.zeros(1, 2, 3, 3, 4),
            torch.zeros(1, 2, 3, 4, 4),
            torch.ones(1, 2).bool(),
            margin=0.1,
            pool=2,
        )


def test_maps_of_frames_are_averaged_over_each_latents():
    """A latent counts where all of its frames' maps do."""
    features = random(1, 1, 9, 2, 3, 4).float()
    valid_BT = torch.ones(1, 9, dtype=torch.bool)
    valid_BT[0, 6] = False
    by_frame = Teacher(
        arrays={"features": features}, valid_BT=valid_BT, num_frames=9, token_grid=(2, 3)
    )
    groups = [features[:, :1], features[:, 1:5], features[:, 5:]]
    by_latent = Teacher(
        arrays={"features": torch.cat([group.mean(1, keepdim=True) for group in groups], 1)},
        valid_BT=torch.tensor([[True, True, False]]),
        num_frames=9,
        token_grid=(2, 3),
    )
    (made,) = build_objectives(TrainConfig(objectives=["token-relation"]))
    assert made.num_maps(9, 9) == made.num_maps(3, 9) == 3
    student = random(2, 1, 3, 2, 3, 4).float()
    torch.testing.assert_close(made(student, by_frame), made(student, by_latent))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("downsampler", ["mean", "learned"])
@pytest.mark.parametrize("maps", [3, 9])
def test_the_settings_choose_the_tokens_and_maps_of_the_full_matrix(maps, downsampler, skip):
    """A learned downsampler has made the student's 2 x 2 tokens before; the teacher has 5 x 4."""
    features, valid_BT = random(1, 2, maps, 5, 4, 7), torch.ones(2, maps, dtype=torch.bool)
    valid_BT[1, -1] = False
    teacher = Teacher(
        arrays={"features": features}, valid_BT=valid_BT, num_frames=9, token_grid=(5, 4)
    )
    tokens = {"downsampler": downsampler, "pool": 3, "skip_first_latent": skip, "margin": 0.05}
    (made,) = build_objectives(TrainConfig(objectives=["token-relation"], token_relation=tokens))
    grid = (2, 2) if downsampler == "learned" else (5, 4)
    student = random(0, 2, 3, *grid, 4).requires_grad_()
    found_B = made(student, teacher)
    if maps == 9:
        groups = (features[:, :1], features[:, 1:5], features[:, 5:])
        features = torch.cat([group.mean(1, keepdim=True) for group in groups], 1)
    first = 1 if skip else 0
    expected = by_matrix(
        student.detach()[:, first:],
        features[:, first:],
        torch.tensor([[True] * 3, [True, True, False]])[:, first:],
        0.05,
        3,
        student_pool=1 if downsampler == "learned" else 3,
    )
    assert found_B.tolist() == pytest.approx(expected, abs=1e-6)
    found_B.sum().backward()
    moved = student.grad.abs().sum((2, 3, 4)) > 0
    assert moved.tolist() == [[not skip, True, True], [not skip, True, False]]
