"""Both forms of the teacher, in every number format, teach what its features in float64 do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stages.teacher_store.features import encode_features
from stages.teacher_store.gram_flow import compute_gram_flow, encode_gram_flow
from stages.train_student.config import TrainConfig
from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.build import build_objectives

CLIPS, MAPS, GRID, CHANNELS, WIDTH = 2, 5, (7, 9), 64, 12
STORED_RADIUS = 3

# Largest error of the loss in nats (it is 0.23 and 0.32), and of its gradient as a share of the
# gradient's norm. Similarities near 1 are rounded by up to 2.4e-4 in float16, which the softmax
# divides by the temperature, 0.1.
ERRORS = {
    ("features", "float16"): (2e-5, 4e-4),
    ("features", "int8"): (2e-4, 1e-2),
    ("gram_flow", "float16"): (2e-4, 3e-3),
    ("gram_flow", "uint8"): (2e-4, 1e-2),
}


def _random(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _teacher_features():
    """Tokens of a coarse plane that drifts, in float64 and of unit norm."""
    plane = _random(0, CLIPS, CHANNELS, 4, 6)
    frames = [
        F.interpolate(plane.roll(t // 2, -1) + 0.3 * _random(1 + t, *plane.shape), GRID)
        for t in range(MAPS)
    ]
    return F.normalize(torch.stack(frames, 1).permute(0, 1, 3, 4, 2), dim=-1)


def _similarities_by_shifts(features_BTHWC, radius):
    """Cosine to each neighbour of the next map, neighbours outside the grid at minus infinity."""
    unit_BTHWC = F.normalize(features_BTHWC, dim=-1)
    now, following = unit_BTHWC[:, :-1], F.pad(unit_BTHWC[:, 1:], (0, 0, *[radius] * 4))
    inside = F.pad(torch.ones(GRID, dtype=torch.bool), [radius] * 4)
    H, W = GRID
    columns = []
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            window = (slice(dy, dy + H), slice(dx, dx + W))
            products = (now * following[:, :, window[0], window[1]]).sum(-1)
            columns.append(products.masked_fill(~inside[window], -torch.inf))
    return torch.stack(columns, dim=-1)


def _expected(student_BTHWC, teacher_BTHWC, radius, temperature, valid_BT):
    """The loss in float64, from definitions."""
    flows = [_similarities_by_shifts(f, radius) for f in (teacher_BTHWC, student_BTHWC)]
    taught, learnt = ((flow / temperature).log_softmax(-1) for flow in flows)
    inside = taught.isfinite()
    terms = taught.exp() * (taught.masked_fill(~inside, 0) - learnt.masked_fill(~inside, 0))
    loss_BP = terms.sum(-1).mean((2, 3))
    counted_BP = valid_BT[:, :-1] & valid_BT[:, 1:]
    return (loss_BP * counted_BP).sum(1) / counted_BP.sum(1)


def _arrays(form, dtype, features_BTHWC):
    """A batch as the stores hold it; the flow is that of the features rounded to float16."""
    clips = []
    for features_THWC in features_BTHWC:
        if form == "features":
            clips.append(encode_features(features_THWC, dtype))
        else:
            flow_PHWK = compute_gram_flow(
                features_THWC.half(), radius=STORED_RADIUS, token_grid=GRID
            )
            clips.append(encode_gram_flow(flow_PHWK, dtype))
    return {name: torch.from_numpy(np.stack([clip[name] for clip in clips])) for name in clips[0]}


@pytest.mark.parametrize("radius", [STORED_RADIUS, 1])
@pytest.mark.parametrize(("form", "dtype"), ERRORS)
def test_loss_and_gradient_are_those_of_features_in_float64(form, dtype, radius):
    """Also where training takes a smaller window than is stored; the last map is not valid."""
    teacher_BTHWC = _teacher_features()
    student_BTHWC = (teacher_BTHWC @ _random(9, CHANNELS, WIDTH) + _random(8, WIDTH)).detach()
    valid_BT = torch.ones(CLIPS, MAPS, dtype=torch.bool)
    valid_BT[1, -1] = False
    exact_BTHWC = student_BTHWC.clone().requires_grad_()
    expected = _expected(exact_BTHWC, teacher_BTHWC, radius, 0.1, valid_BT)
    expected.sum().backward()

    arrays = _arrays(form, dtype, teacher_BTHWC)
    teacher = Teacher(arrays=arrays, valid_BT=valid_BT, num_frames=MAPS, token_grid=GRID)
    taken_BTHWC = student_BTHWC.float().requires_grad_()
    (lgf,) = build_objectives(TrainConfig(lgf={"radius": radius, "temperature": 0.1}))
    loss = lgf(taken_BTHWC, teacher)
    loss.sum().backward()

    loss_error, gradient_error = ERRORS[form, dtype]
    assert (loss.mean() - expected.mean()).abs() < loss_error
    difference = (taken_BTHWC.grad - exact_BTHWC.grad).norm() / exact_BTHWC.grad.norm()
    assert difference.item() < gradient_error


def test_a_stored_window_that_is_too_small_is_refused():
    arrays = _arrays("gram_flow", "float16", _teacher_features())
    valid_BT = torch.ones(CLIPS, MAPS, dtype=torch.bool)
    teacher = Teacher(arrays=arrays, valid_BT=valid_BT, num_frames=MAPS, token_grid=GRID)
    with pytest.raises(ValueError, match="radius 3 holds the windows of radius 1 to 3, not 4"):
        teacher.gram_flows(4)
