import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from hypothesis import given
from hypothesis import strategies as st

from stages.local_gram_flow import (
    frames_to_latents,
    latent_frame_of_frame,
    resample_to_grid,
    time_weights,
)


def test_latent_k_depends_on_its_own_frames_newest_and_on_none_after() -> None:
    """The causal VAE itself says which latent a frame first reaches through its convolutions
    (its group norms, taken out here, share their statistics over time)."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=2,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    for name, module in list(vae.encoder.named_modules()):
        if isinstance(module, torch.nn.GroupNorm):
            vae.encoder.set_submodule(name, torch.nn.Identity())
    num_frames = 9
    video = torch.randn(1, 3, num_frames, 16, 16)

    def encode(video_BCTHW: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return vae.encode(video_BCTHW).latent_dist.mean

    plain = encode(video)
    first_reached = []
    for frame in range(num_frames):
        changed = video.clone()
        changed[:, :, frame] += 1.0
        per_latent = (encode(changed) - plain).abs().amax(dim=(0, 1, 3, 4))
        first_reached.append(int((per_latent > 1e-6).nonzero()[0]))
    assert first_reached == latent_frame_of_frame(num_frames).tolist()


def test_latent_rate_is_the_mean_of_each_group() -> None:
    features = torch.randn(9, 2, 3, 4, dtype=torch.float64)
    expected = torch.stack([features[0], features[1:5].mean(0), features[5:9].mean(0)])
    torch.testing.assert_close(frames_to_latents(features), expected)


@given(latents=st.integers(2, 14))
def test_interpolation_equals_numpy_on_the_true_frame_positions(latents: int) -> None:
    num_frames = 4 * (latents - 1) + 1
    knots = [0.0] + [4 * k - 1.5 for k in range(1, latents)]
    expected = np.stack(
        [np.interp(np.arange(num_frames), knots, row) for row in np.eye(latents)], axis=-1
    )
    weights_TJ = time_weights(num_frames, num_frames)
    assert weights_TJ is not None
    np.testing.assert_allclose(weights_TJ.numpy(), expected, atol=1e-6)


def test_a_signal_linear_in_time_survives_the_way_to_latents_and_back() -> None:
    ramp = torch.arange(49, dtype=torch.float64).view(49, 1, 1, 1)
    weights_TJ = time_weights(49, 49)
    assert weights_TJ is not None
    back = (weights_TJ.double() @ frames_to_latents(ramp).flatten()).view(49, 1, 1, 1)
    inside = slice(0, 47)  # after the last knot, 46.5, the value is held
    torch.testing.assert_close(back[inside], ramp[inside])
    assert torch.equal(back[47:].flatten(), torch.tensor([46.5, 46.5], dtype=torch.float64))


@pytest.mark.parametrize("num_frames", [0, 4, 48])
def test_frame_counts_that_do_not_fit_the_vae_are_refused(num_frames: int) -> None:
    with pytest.raises(ValueError, match="4N\\+1"):
        latent_frame_of_frame(num_frames)


@pytest.mark.parametrize("num_frames", [9, 13, 17, 81])
@pytest.mark.parametrize("at_frame_rate", [True, False])
def test_when_tokens_span_two_latents_time_stays_in_place(
    num_frames: int, at_frame_rate: bool
) -> None:
    """A feature that says when its frame is must still say so after both interpolations."""
    num_latents = (num_frames - 1) // 4 + 1
    weights_TJ = time_weights(
        num_frames if at_frame_rate else num_latents, num_frames, patch_size_t=2
    )
    assert weights_TJ is not None
    torch.testing.assert_close(weights_TJ.sum(1), torch.ones(len(weights_TJ)))
    frames_of_latent = [[0], *([4 * k - 3, 4 * k - 2, 4 * k - 1, 4 * k] for k in range(1, 99))]
    nothing: list[list[int]] = [[]]
    covered = nothing * (num_latents % 2) + frames_of_latent[:num_latents]
    pairs = zip(covered[::2], covered[1::2], strict=True)
    when_J = np.array([np.mean(first + second) for first, second in pairs])
    when_T = weights_TJ.double().numpy() @ when_J
    latents_T = [np.mean(frames) for frames in frames_of_latent[:num_latents]]
    place_T = np.arange(num_frames) if at_frame_rate else np.array(latents_T)
    np.testing.assert_allclose(when_T, place_T.clip(when_J[0], when_J[-1]), atol=1e-5)


@given(latents=st.integers(2, 14), tubelet=st.sampled_from([1, 2, 4]), span=st.sampled_from([1, 2]))
def test_tubelets_meet_the_tokens_of_their_frames(latents: int, tubelet: int, span: int) -> None:
    """Against a loop over frames; frame 0, which no tubelet covers, takes no part."""
    num_frames = 4 * (latents - 1) + 1
    frames_of_token: dict[int, list[int]] = {}
    for frame in range(1, num_frames):
        latent = next(k for k in range(1, 99) if 4 * k - 3 <= frame <= 4 * k)
        padding = latents % span
        frames_of_token.setdefault((latent + padding) // span, []).append(frame)
    tokens = -(-latents // span)
    knots = {token: np.mean(frames) for token, frames in frames_of_token.items()}
    expected = np.zeros(((num_frames - 1) // tubelet, tokens))
    for row, first in enumerate(range(1, num_frames, tubelet)):
        centre = np.mean(range(first, first + tubelet))
        for token in knots:
            one_hot = [float(other == token) for other in knots]
            expected[row, token] = np.interp(centre, list(knots.values()), one_hot)
    weights_TJ = time_weights(len(expected), num_frames, patch_size_t=span, frames_per_map=tubelet)
    assert weights_TJ is not None
    np.testing.assert_allclose(weights_TJ.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(weights_TJ.sum(1).numpy(), 1.0, atol=1e-6)


def test_tubelets_of_two_frames_are_videorepas_upsampling_without_the_first_latent() -> None:
    tokens_JC = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
    expected_CM = torch.nn.functional.interpolate(
        tokens_JC[1:].T[None, :, :, None, None], scale_factor=(2.0, 1.0, 1.0), mode="trilinear"
    )[0, :, :, 0, 0]
    weights_TJ = time_weights(24, 49, frames_per_map=2)
    assert weights_TJ is not None
    torch.testing.assert_close(weights_TJ @ tokens_JC, expected_CM.T)


def test_tubelets_that_do_not_cover_the_clip_are_refused() -> None:
    with pytest.raises(ValueError, match="23 maps of 2 frames each; they must cover the 48 frames"):
        time_weights(23, 49, frames_per_map=2)


def test_maps_that_fit_neither_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="has 5 maps per clip"):
        time_weights(5, 9)


def test_a_ramp_across_the_picture_stays_one_on_the_token_grid() -> None:
    """Cell centres of both grids lie at (i + 0.5) / n of the picture."""
    columns = (torch.arange(64) + 0.5) / 64
    features = columns.expand(1, 1, 64, 64)
    found = resample_to_grid(features, 30, 45)
    expected = (torch.arange(45) + 0.5) / 45
    assert found.shape == (1, 30, 45, 1)
    # a shift by half a token (align_corners=True, say) would be 0.011 off
    torch.testing.assert_close(found[0, 15, 2:-2, 0], expected[2:-2], atol=1e-3, rtol=0)


def test_the_mean_over_latents_needs_no_values() -> None:
    """Shapes alone, on the meta device: nothing waits for what a device computes."""
    found = frames_to_latents(torch.empty(49, 2, 3, 4, device="meta"))
    assert found.shape == (13, 2, 3, 4)
    assert found.device.type == "meta"
