import numpy as np
import pytest
import torch

from stages.extract_features.teacher.two_way import cycle_consistency


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_overlap_of_the_frames_seen_by_both() -> None:
    forward, backward = random_logits(0), random_logits(1)
    seen = torch.tensor([True, False, True, True, False, True])
    overlaps = []
    for t in range(6):
        if seen[t]:
            ahead = {tuple(p) for p in np.argwhere(forward[t].numpy() > 0)}
            back = {tuple(p) for p in np.argwhere(backward[t].numpy() > 0)}
            overlaps.append(len(ahead & back) / len(ahead | back))
    assert cycle_consistency(forward, backward, seen) == pytest.approx(
        sum(overlaps) / len(overlaps), abs=1e-12
    )


def test_equal_masks_agree_fully_and_disjoint_ones_not_at_all() -> None:
    seen = torch.ones(6, dtype=torch.bool)
    logits = random_logits(0)
    assert cycle_consistency(logits, 3 * logits, seen) == 1.0
    assert cycle_consistency(logits, -logits, seen) == 0.0


def test_frames_that_one_track_does_not_see_do_not_count() -> None:
    forward = random_logits(0)
    backward = forward.clone()
    backward[2] = -1024
    seen = torch.arange(6) != 2
    assert cycle_consistency(forward, backward, seen) == 1.0


def test_no_frame_seen_by_both_has_no_consistency() -> None:
    logits = random_logits(0)
    assert cycle_consistency(logits, logits, torch.zeros(6, dtype=torch.bool)) is None


def test_masks_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(6, 5, 7\)"):
        cycle_consistency(random_logits(0), random_logits(1)[:4], torch.ones(6, dtype=torch.bool))
