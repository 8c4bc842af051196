import torch

from stages.local_gram_flow import time_weights
from stages.train_student.projector import Projector, TemporalConvolution


def test_at_frame_rate_it_interpolates_and_starts_without_smoothing():
    torch.manual_seed(0)
    tokens_BJHWC = torch.randn(2, 3, 2, 2, 6)
    weights_TJ = time_weights(9, 9)
    projector = Projector(6, (8, 8, 4), weights_TJ)
    without = Projector(6, (8, 8, 4), None)
    without.load_state_dict(projector.state_dict(), strict=False)
    torch.testing.assert_close(
        projector(tokens_BJHWC),
        torch.einsum("tj,bjhwc->bthwc", weights_TJ, without(tokens_BJHWC)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_at_latent_rate_tokens_and_maps_correspond():
    assert time_weights(3, 9) is None
    assert Projector(6, (8, 8, 4), None)(torch.randn(1, 3, 2, 2, 6)).shape == (1, 3, 2, 2, 4)


def test_temporal_convolution_equals_torch_with_repeated_ends():
    torch.manual_seed(0)
    ours = TemporalConvolution(5)
    features_BTHWC = torch.randn(2, 7, 2, 3, 5)
    assert torch.equal(ours(features_BTHWC), features_BTHWC)
    torch.nn.init.normal_(ours.taps_3C)
    theirs = torch.nn.Conv1d(5, 5, 3, padding=1, padding_mode="replicate", groups=5, bias=False)
    theirs.weight.data = ours.taps_3C.data.T[:, None]
    rows_NCT = features_BTHWC.permute(0, 2, 3, 4, 1).reshape(-1, 5, 7)
    expected = theirs(rows_NCT).view(2, 2, 3, 5, 7).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(ours(features_BTHWC), expected)
