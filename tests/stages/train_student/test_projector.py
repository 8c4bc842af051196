import numpy as np
import pytest
import torch

from stages.local_gram_flow import latents_to_frames
from stages.train_student.projector import Projector, TemporalConvolution, time_weights


def test_at_frame_rate_it_interpolates_and_starts_without_smoothing():
    torch.manual_seed(0)
    tokens_BJHWC = torch.randn(2, 3, 2, 2, 6)
    projector = Projector(6, (8, 8, 4), time_weights(9, 9, 1))
    without = Projector(6, (8, 8, 4), None)
    without.load_state_dict(projector.state_dict(), strict=False)
    torch.testing.assert_close(
        projector(tokens_BJHWC), latents_to_frames(without(tokens_BJHWC), 9), rtol=1e-5, atol=1e-6
    )


def test_at_latent_rate_tokens_and_maps_correspond():
    assert time_weights(3, 9, 1) is None
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


@pytest.mark.parametrize("num_frames", [9, 13, 17, 81])
@pytest.mark.parametrize("at_frame_rate", [True, False])
def test_when_tokens_span_two_latents_time_stays_in_place(num_frames, at_frame_rate):
    """A feature that says when its frame is must still say so after both interpolations."""
    num_latents = (num_frames - 1) // 4 + 1
    weights_TJ = time_weights(num_frames if at_frame_rate else num_latents, num_frames, 2)
    torch.testing.assert_close(weights_TJ.sum(1), torch.ones(len(weights_TJ)))
    frames_of_latent = [[0], *([4 * k - 3, 4 * k - 2, 4 * k - 1, 4 * k] for k in range(1, 99))]
    covered = [[]] * (num_latents % 2) + frames_of_latent[:num_latents]
    pairs = zip(covered[::2], covered[1::2], strict=True)
    when_J = np.array([np.mean(first + second) for first, second in pairs])
    when_T = weights_TJ.double().numpy() @ when_J
    latents_T = [np.mean(frames) for frames in frames_of_latent[:num_latents]]
    place_T = np.arange(num_frames) if at_frame_rate else np.array(latents_T)
    np.testing.assert_allclose(when_T, place_T.clip(when_J[0], when_J[-1]), atol=1e-5)


def test_maps_that_fit_neither_rate_are_refused():
    with pytest.raises(ValueError, match="has 5 maps per clip"):
        time_weights(5, 9, 1)
