import torch

from stages.local_gram_flow import time_weights
from stages.train_student.model.projector import Projector, TemporalConvolution


def test_at_frame_rate_it_interpolates_and_starts_without_smoothing():
    torch.manual_seed(0)
    tokens_BJHWC = torch.randn(2, 3, 2, 2, 6)
    weights_TJ = time_weights(9, 9)
    projector = Projector(6, (8, 8, 4), smooth=True)
    without = Projector(6, (8, 8, 4), smooth=False)
    without.load_state_dict(projector.state_dict(), strict=False)
    torch.testing.assert_close(
        projector(tokens_BJHWC, weights_TJ),
        torch.einsum("tj,bjhwc->bthwc", weights_TJ, without(tokens_BJHWC, None)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_at_latent_rate_tokens_and_maps_correspond():
    assert time_weights(3, 9) is None
    projector = Projector(6, (8, 8, 4), smooth=False)
    assert projector(torch.randn(1, 3, 2, 2, 6), None).shape == (1, 3, 2, 2, 4)


def test_clips_of_other_lengths_pass_the_same_layers():
    """Each bucket has its own number of frames."""
    projector = Projector(6, (8, 4), smooth=True).bfloat16()
    for frames in (5, 9, 17):
        tokens_BJHWC = torch.randn(1, (frames - 1) // 4 + 1, 2, 3, 6).bfloat16()
        found = projector(tokens_BJHWC, time_weights(frames, frames))
        assert found.shape == (1, frames, 2, 3, 4)
        assert found.dtype == torch.bfloat16


def test_each_width_is_a_layer():
    layers = [m for m in Projector(6, (8, 7, 5, 3), smooth=False).layers if hasattr(m, "bias")]
    shapes = [tuple(m.weight.shape) for m in layers]
    assert shapes == [(8, 6), (8,), (7, 8), (7,), (5, 7), (5,), (3, 5)]


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
