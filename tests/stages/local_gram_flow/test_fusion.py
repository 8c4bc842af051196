import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.local_gram_flow import fuse_directions, local_gram_flow
from tests.stages.local_gram_flow.reference import similarities_by_loop


@settings(max_examples=25, deadline=None)
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
