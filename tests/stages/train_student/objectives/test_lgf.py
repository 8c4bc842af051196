"""Local Gram Flow as an objective: what of the teacher it compares, and which tokens count how."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stages.local_gram_flow import fuse_directions, fuse_subjects
from stages.train_student.config import TrainConfig
from stages.train_student.model.teacher import Teacher, TeacherLayout
from stages.train_student.objectives.build import build_objectives
from tests.stages.local_gram_flow.reference import kl_by_loop, similarities_by_loop

CLIPS, FRAMES, GRID = 2, 5, (3, 5)
ALL = torch.ones(CLIPS, FRAMES, dtype=torch.bool)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features(seed, channels=6):
    return random(seed, CLIPS, FRAMES, *GRID, channels)


def teacher(features_BTHWC, valid_BT=ALL, **changes):
    settings = {
        "arrays": {"features": features_BTHWC},
        "valid_BT": valid_BT,
        "num_frames": FRAMES,
        "token_grid": GRID,
    }
    return Teacher(**settings | changes)


def lgf(**settings):
    (made,) = build_objectives(TrainConfig(lgf={"radius": 1} | settings))
    assert made.name == "lgf"
    return made


def test_none_is_plain_fine_tuning():
    assert build_objectives(TrainConfig(objectives=[])) == ()


def test_loss_is_zero_when_student_equals_teacher():
    for divergence in ("kl", "l2"):
        objective = lgf(divergence=divergence)
        assert objective(features(0), teacher(features(0))).max() < 1e-9
        assert objective(features(0), teacher(features(1))).min() > 1e-3


def test_widths_may_differ_and_gradient_flows_to_the_student_alone():
    student, taught = features(0).requires_grad_(), features(1, channels=9).requires_grad_()
    lgf()(student, teacher(taught)).sum().backward()
    assert student.grad.abs().sum() > 0
    assert taught.grad is None


def test_half_precision_features_are_compared_in_float32():
    loss_B = lgf()(features(0).bfloat16(), teacher(features(1).half()))
    assert loss_B.dtype == torch.float32
    assert loss_B.shape == (CLIPS,)


def test_a_pair_counts_where_both_maps_are_valid():
    """Clip 0 keeps maps 0, 1 and 3: one pair. Clip 1 keeps all."""
    valid_BT = ALL.clone()
    valid_BT[0, [2, 4]] = False
    student, taught = features(0), features(1)
    first = lgf()(student[:1, :2], teacher(taught[:1, :2], ALL[:1, :2]))
    second = lgf()(student[1:], teacher(taught[1:], ALL[1:]))
    found_B = lgf()(student, teacher(taught, valid_BT))
    torch.testing.assert_close(found_B, torch.cat([first, second]))


def test_a_single_valid_map_makes_no_pair():
    valid_BT = torch.zeros_like(ALL)
    valid_BT[:, 2] = True
    student = features(0).requires_grad_()
    loss_B = lgf()(student, teacher(features(1), valid_BT))
    loss_B.sum().backward()
    assert loss_B.tolist() == [0.0, 0.0]
    assert not student.grad.any()


@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("content", [6e4, float("inf"), float("nan")])
def test_what_invalid_maps_hold_changes_neither_loss_nor_gradient(whose, native, content):
    valid_BT = ALL.clone()
    valid_BT[0, 3] = False
    student, taught = features(0), F.normalize(features(1, channels=8), dim=-1) * 0.5**0.5
    layout = TeacherLayout(native=native, parts=2, forward_weight=0.5)
    results = []
    for value in (0.0, content):
        spoiled = [x.clone() for x in (student, taught)]
        spoiled[whose == "teacher"].masked_fill_(~valid_BT[..., None, None, None], value)
        given = spoiled[0].requires_grad_()
        loss_B = lgf(directions="averaged")(given, teacher(spoiled[1], valid_BT, layout=layout))
        loss_B.sum().backward()
        results.append((loss_B.detach(), given.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1][0, 3].any()


def _stored(tracks, share, slots):
    """What stage one stores of a clip's subjects' two directions, as float64."""
    fused = [fuse_directions(f, b, fusion="gram_flow", forward_weight=share) for f, b in tracks]
    return fuse_subjects(fused, num_slots=slots)


def _similarities(tracks, directions, share):
    """Mean over the subjects of the similarities of what `directions` makes of f and b alone."""
    total = 0.0
    for f, b in tracks:
        f, b = (x / x.norm(dim=-1, keepdim=True) for x in (f, b))
        chosen = f if directions == "forward" else share * f + (1 - share) * b
        values, inside = similarities_by_loop(chosen[None].numpy(), 1)
        total = total + values / len(tracks)
    return total, inside


@pytest.mark.parametrize("directions", ["forward", "averaged"])
@pytest.mark.parametrize(("subjects", "slots"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_directions_are_those_of_the_separate_tracks_in_float64(directions, subjects, slots, share):
    """From stored features alone, against a loop over the forward and backward tracks."""
    tracks = [
        [random(10 * s + d, FRAMES, *GRID, 4).double() for d in range(2)] for s in range(subjects)
    ]
    student_BTHWC = random(99, 1, FRAMES, *GRID, 6).double()
    expected = kl_by_loop(
        similarities_by_loop(student_BTHWC.numpy(), 1)[0],
        *_similarities(tracks, directions, share),
        0.2,
    )
    held = teacher(
        _stored(tracks, share, slots)[None],
        ALL[:1],
        layout=TeacherLayout(parts=2 * slots, forward_weight=share),
    )
    found = lgf(directions=directions, temperature=0.2)(student_BTHWC, held)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    fused = lgf(temperature=0.2)(student_BTHWC, held)
    assert abs(fused.item() - expected) > 1e-4


@pytest.mark.parametrize("directions", ["forward", "averaged"])
def test_directions_on_sam2s_own_grid_are_taken_before_they_are_resampled(directions):
    """As a store of that fusion would have been, in float64."""
    f, b = (random(d, FRAMES, 8, 8, 4).double() for d in range(2))
    fusion = "forward" if directions == "forward" else "average"
    alone = fuse_directions(f, b, fusion=fusion, forward_weight=0.5)
    layouts = [
        TeacherLayout(native=True, parts=2, forward_weight=0.5),
        TeacherLayout(native=True, parts=1),
    ]
    losses = [
        lgf(directions=which)(features(0)[:1].double(), teacher(x[None], ALL[:1], layout=layout))
        for which, x, layout in (
            (directions, _stored([(f, b)], 0.5, 1), layouts[0]),
            ("fused", alone, layouts[1]),
        )
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)


def _masks(seed, *, directions=("forward", "backward"), size=(6, 10)):
    """As the masks store holds them: twice as fine as the token grid."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CLIPS, FRAMES, *size)
    masks = {name: torch.randint(0, 256, shape, generator=generator) for name in directions}
    valid = torch.ones(CLIPS, FRAMES, dtype=torch.uint8)
    valid[1, 2] = 0
    return {name: mask.to(torch.uint8) for name, mask in masks.items()} | {"valid": valid}


def _weights_by_loop(masks, foreground_weight):
    """float64 [B, T, H, W]: the antialiased share of each token by the resampling's definition."""
    directions = [mask for name, mask in masks.items() if name != "valid"]
    pixels = sum(mask.double() for mask in directions).numpy() / (255 * len(directions))
    weights = np.ones((CLIPS, FRAMES, *GRID))
    for b, t, y, x in np.ndindex(weights.shape):
        if masks["valid"][b, t]:
            rows, columns = (_triangle(i, n, 2 * n) for i, n in ((y, GRID[0]), (x, GRID[1])))
            share = rows @ pixels[b, t] @ columns
            weights[b, t, y, x] = 1 + (foreground_weight - 1) * share
    return weights


def _triangle(place, coarse, fine):
    """Weights of the fine pixels in a coarse one: a triangle two coarse pixels wide, cut off."""
    scale = fine / coarse
    distance = np.abs(np.arange(fine) + 0.5 - (place + 0.5) * scale) / scale
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum()


@pytest.mark.parametrize("directions", [("forward", "backward"), ("forward",)])
@pytest.mark.parametrize("foreground_weight", [0.0, 0.4, 5.0])
def test_foreground_weight_makes_a_weighted_mean_over_tokens(directions, foreground_weight):
    masks = _masks(7, directions=directions)
    valid_BT = ALL.clone()
    valid_BT[0, 4] = False
    student, taught = features(0).double(), features(1).double()
    found_B = lgf(foreground_weight=foreground_weight, temperature=0.3)(
        student, teacher(taught, valid_BT, masks=masks)
    )
    (s, inside), (g, _) = (similarities_by_loop(x.numpy(), 1) for x in (student, taught))
    weights = _weights_by_loop(masks, foreground_weight)
    for b in range(CLIPS):
        total = over = 0.0
        for t, y, x in np.ndindex(FRAMES - 1, *GRID):
            if valid_BT[b, t] and valid_BT[b, t + 1]:
                one = np.s_[b : b + 1, t : t + 1, y : y + 1, x : x + 1]
                total += weights[b, t, y, x] * kl_by_loop(s[one], g[one], inside[one], 0.3)
                over += weights[b, t, y, x]
        assert found_B[b].item() == pytest.approx(total / over, rel=1e-5)


def test_at_the_latent_rate_weights_are_the_means_over_each_latents_frames():
    masks = _masks(8)
    at_latents = teacher(features(0)[:, :2], ALL[:, :2], masks=masks).token_weight(3.0)
    weights = _weights_by_loop(masks, 3.0)
    expected = np.stack([weights[:, 0], weights[:, 1:].mean(1)], axis=1)
    np.testing.assert_allclose(at_latents.double().numpy(), expected, rtol=1e-5)


def test_where_nothing_weighs_there_is_no_loss_and_no_gradient():
    """All is subject, and the subject weighs nothing."""
    masks = {name: torch.full_like(mask, 255) for name, mask in _masks(7).items()}
    student = features(0).requires_grad_()
    loss_B = lgf(foreground_weight=0.0)(student, teacher(features(1), masks=masks))
    loss_B.sum().backward()
    assert loss_B.tolist() == [0.0, 0.0]
    assert not student.grad.any()


def test_a_distinct_teacher_is_described_by_its_entropy():
    described = lgf(temperature=0.05).describe_teacher(teacher(features(0)))
    share = float(described.split(" has ")[1].split()[0])
    assert 0.1 < share < 0.95
    assert "warning" not in described


def test_a_nearly_uniform_teacher_is_warned_of_and_hidden_maps_do_not_count():
    uniform = torch.ones(CLIPS, FRAMES, *GRID, 6) + 0.01 * features(0)
    described = lgf(temperature=0.1).describe_teacher(teacher(uniform))
    assert described.startswith("warning: the teacher's Gram flow has 1.000 of the entropy")
    assert "train.lgf.temperature=0.1" in described
    valid_BT = ALL.clone()
    valid_BT[1] = False
    uniform[1] = torch.nan
    assert lgf().describe_teacher(teacher(uniform, valid_BT)) == described


def test_nothing_is_said_of_a_teacher_without_a_softmax_or_a_valid_pair():
    assert lgf(divergence="l2").describe_teacher(teacher(features(0))) is None
    assert lgf().describe_teacher(teacher(features(0), torch.zeros_like(ALL))) is None
