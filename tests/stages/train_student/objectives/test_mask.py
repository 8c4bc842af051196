import math

import numpy as np
import pytest
import torch

from stages.train_student.config import TrainConfig
from stages.train_student.model.teacher import Teacher
from stages.train_student.objectives.build import build_objectives
from stages.train_student.objectives.mask import mask_loss


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def by_loop(logits, share, valid):
    losses = []
    for b in range(len(logits)):
        terms = []
        for t, y, x in np.ndindex(*logits.shape[1:4]):
            p, m = 1 / (1 + math.exp(-float(logits[b, t, y, x, 0]))), float(share[b, t, y, x])
            if valid[b, t]:
                terms.append(-m * math.log(p) - (1 - m) * math.log(1 - p))
        losses.append(np.mean(terms) if terms else 0.0)
    return losses


@pytest.mark.parametrize("kept", [(True, True, True), (False, True, False), (False,) * 3])
def test_loss_equals_a_float64_loop(kept):
    logits, share = random(0, 2, 3, 2, 4, 1), random(1, 2, 3, 2, 4).sigmoid()
    valid_BT = torch.tensor([[True] * 3, kept])
    found_B = mask_loss(logits, share, valid_BT)
    assert found_B.tolist() == pytest.approx(by_loop(logits, share, valid_BT), abs=1e-12)


def test_invalid_frames_never_count():
    valid_BT = torch.tensor([[True, False]])
    logits = random(0, 1, 2, 2, 2, 1).requires_grad_()
    spoiled = logits.masked_fill(~valid_BT[..., None, None, None], float("nan"))
    share = random(1, 1, 2, 2, 2).sigmoid().masked_fill(~valid_BT[..., None, None], float("nan"))
    loss_B = mask_loss(spoiled, share, valid_BT)
    loss_B.sum().backward()
    torch.testing.assert_close(loss_B, mask_loss(logits[:, :1], share[:, :1], valid_BT[:, :1]))
    assert logits.grad[0, 0].abs().min() > 0
    assert not logits.grad[0, 1].any()


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be \(1, 2, 3, 4, 1\)"):
        mask_loss(torch.zeros(1, 2, 3, 4, 2), torch.zeros(1, 2, 3, 4), torch.ones(1, 2).bool())


def test_what_is_predicted_is_each_tokens_share_of_the_subject():
    """A mask that covers the left of three token columns, in one direction of two."""
    mask = torch.zeros(1, 5, 4, 12, dtype=torch.uint8)
    mask[..., :4] = 255
    valid = torch.ones(1, 5, dtype=torch.uint8)
    valid[0, 3] = 0
    teacher = Teacher(
        arrays=None,
        valid_BT=None,
        masks={"forward": mask, "backward": torch.zeros_like(mask), "valid": valid},
        num_frames=5,
        token_grid=(2, 3),
    )
    coverage_BTHW, valid_BT = teacher.mask_coverage()
    assert valid_BT.tolist() == [[True, True, True, False, True]]
    assert not coverage_BTHW[0, 3].any()
    # The antialiased filter is a triangle two tokens wide: a seventh of the first token's, which is
    # cut off at the border, and an eighth of the second's lies over the neighbour.
    expected = torch.tensor([0.5 * 6 / 7, 0.5 / 8, 0.0])
    torch.testing.assert_close(coverage_BTHW[0, 0], expected.expand(2, 3), atol=1e-6, rtol=0)
    (made,) = build_objectives(TrainConfig(objectives=["mask"]))
    assert made.num_maps(None, 5) == 5
    assert made.num_maps(2, 5) == 5
    logits = torch.zeros(1, 5, 2, 3, 1)
    assert made(logits, teacher).item() == pytest.approx(math.log(2))
