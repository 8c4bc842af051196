import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.local_gram_flow import (
    Directions,
    Fusion,
    fuse_directions,
    fuse_subjects,
    local_gram_flow,
    regrid_fused,
    take_directions,
)
from tests.stages.local_gram_flow.reference import similarities_by_loop


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_gram_flow_of_the_fusion_is_the_weighted_sum_of_both_gram_flows(
    seed: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    forward, backward = (torch.randn(3, 3, 4, 5, generator=generator).double() for _ in range(2))
    fused = fuse_directions(forward, backward, fusion="gram_flow", forward_weight=share)
    expected = sum(
        weight * similarities_by_loop(features[None].numpy(), 1)[0]
        for weight, features in ((share, forward), (1 - share, backward))
    )
    np.testing.assert_allclose(local_gram_flow(fused[None], 1).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("fusion", ["gram_flow", "average", "forward"])
def test_fused_tokens_have_unit_norm(fusion: str) -> None:
    forward, backward = torch.randn(2, 3, 2, 2, 4) * 50
    fused = fuse_directions(forward, backward, fusion=fusion, forward_weight=0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(fused.norm(dim=-1), torch.ones(3, 2, 2))
    assert fused.shape[-1] == (8 if fusion == "gram_flow" else 4)


def test_averaging_differs_from_fusing_in_gram_flow_space() -> None:
    torch.manual_seed(0)
    forward, backward = torch.randn(2, 2, 3, 3, 8)
    flows = [
        local_gram_flow(fuse_directions(forward, backward, fusion=f, forward_weight=0.5)[None], 1)
        for f in ("gram_flow", "average")
    ]
    assert (flows[0] - flows[1]).abs().max() > 0.1


def test_a_missing_backward_track_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a backward track"):
        fuse_directions(torch.zeros(2, 1, 1, 3), None, fusion="gram_flow", forward_weight=0.5)


@pytest.mark.parametrize("num_subjects", [1, 2, 3])
def test_gram_flow_of_several_subjects_is_the_mean_of_their_fused_gram_flows(
    num_subjects: int,
) -> None:
    generator = torch.Generator().manual_seed(num_subjects)
    share = 0.3
    subjects = torch.randn(num_subjects, 2, 3, 4, 5, 6, generator=generator).double()
    fused = fuse_subjects(
        [fuse_directions(f, b, fusion="gram_flow", forward_weight=share) for f, b in subjects],
        num_slots=3,
    )
    assert fused.shape == (3, 4, 5, 3 * 2 * 6)
    expected = sum(
        weight * similarities_by_loop(direction[None].numpy(), 1)[0] / num_subjects
        for subject in subjects
        for weight, direction in zip((share, 1 - share), subject, strict=True)
    )
    np.testing.assert_allclose(local_gram_flow(fused[None], 1).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("num_subjects", [0, 3])
def test_subjects_that_do_not_fit_the_slots_are_refused(num_subjects: int) -> None:
    with pytest.raises(ValueError, match=f"{num_subjects} subjects do not fit into 2 slots"):
        fuse_subjects([torch.zeros(2, 1, 1, 3)] * num_subjects, num_slots=2)


def fused_subjects() -> torch.Tensor:
    """Two subjects in three slots, [3, 6, 8, 24] float64: six parts of four channels."""
    generator = torch.Generator().manual_seed(0)
    subjects = torch.randn(2, 2, 3, 6, 8, 4, generator=generator).double()
    return fuse_subjects(
        [fuse_directions(f, b, fusion="gram_flow", forward_weight=0.2) for f, b in subjects],
        num_slots=3,
    )


def test_regridding_resamples_each_part_and_keeps_its_norm() -> None:
    fused = fused_subjects()
    got = regrid_fused(fused, 3, 4, parts=6)
    assert got.shape == (3, 3, 4, 24)
    # Halving both sides: a triangle of twice the width, 1/8, 3/8, 3/8, 1/8, renormalised at edges.
    rows, columns = halving_weights(6), halving_weights(8)
    norms = np.sqrt(np.array([0.2, 0.8, 0.2, 0.8, 0.0, 0.0]) / 2)
    for part, norm in enumerate(norms):
        channels = slice(4 * part, 4 * part + 4)
        mixed = np.einsum("yh,xw,thwc->tyxc", rows, columns, fused[..., channels].numpy())
        length = np.linalg.norm(mixed, axis=-1, keepdims=True)
        expected = norm * np.divide(mixed, length, out=np.zeros_like(mixed), where=length > 0)
        np.testing.assert_allclose(got[..., channels].numpy(), expected, atol=1e-12)


def halving_weights(source: int) -> np.ndarray:
    weights = np.zeros((source // 2, source))
    for target in range(source // 2):
        for tap, weight in zip(range(2 * target - 1, 2 * target + 3), (1, 3, 3, 1), strict=True):
            if 0 <= tap < source:
                weights[target, tap] = weight
    return weights / weights.sum(axis=1, keepdims=True)


def test_regridding_to_the_same_grid_changes_nothing() -> None:
    fused = fused_subjects()
    torch.testing.assert_close(regrid_fused(fused, 6, 8, parts=6), fused)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_regridding_leaves_zero_frames_zero_and_the_rest_unit(dtype: torch.dtype) -> None:
    fused = fused_subjects().to(dtype)
    fused[1] = 0
    got = regrid_fused(fused, 5, 3, parts=6)
    assert got.dtype == torch.float32
    assert not got[1].any() and not got[..., 16:].any()
    torch.testing.assert_close(got[[0, 2]].norm(dim=-1), torch.ones(2, 5, 3), atol=1e-3, rtol=0)


def test_channels_that_do_not_split_into_the_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="24 fused channels do not split into 5"):
        regrid_fused(fused_subjects(), 3, 4, parts=5)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), share=st.floats(0.05, 1), slots=st.integers(1, 3))
def test_directions_taken_are_those_that_were_fused(seed: int, share: float, slots: int) -> None:
    """As if each subject's tracks had been fused by `forward` or `average`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    subjects = [torch.randn(2, 3, 2, 2, 4, generator=generator).double() for _ in range(2)][:slots]
    fused = fuse_subjects(
        [fuse_directions(f, b, fusion="gram_flow", forward_weight=share) for f, b in subjects],
        num_slots=slots,
    )
    cases: list[tuple[Directions, Fusion]] = [("forward", "forward"), ("averaged", "average")]
    for directions, fusion in cases:
        alone = [fuse_directions(f, b, fusion=fusion, forward_weight=share) for f, b in subjects]
        expected = fuse_subjects(alone, num_slots=slots)
        taken = take_directions(fused, 2 * slots, directions, forward_weight=share)
        torch.testing.assert_close(taken, expected, rtol=1e-9, atol=1e-12)


def test_frames_without_a_visit_stay_zero_in_every_direction() -> None:
    fused = torch.zeros(1, 2, 2, 8)
    for directions in ("fused", "forward", "averaged"):
        taken = take_directions(fused, 2, directions, forward_weight=0.5)
        assert not taken.any()


def test_directions_of_other_fusions_are_refused() -> None:
    with pytest.raises(ValueError, match="fusion=gram_flow"):
        take_directions(torch.zeros(1, 2, 2, 9), 3, "averaged", forward_weight=0.5)
    with pytest.raises(ValueError, match="forward_weight 0"):
        take_directions(torch.zeros(1, 2, 2, 8), 2, "forward", forward_weight=0.0)
