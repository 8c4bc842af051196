import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from hypothesis import given
from hypothesis import strategies as st

from stages.local_gram_flow import (
    frames_to_latents,
    interpolation_weights,
    latent_frame_of_frame,
    latents_to_frames,
    resample_to_grid,
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


@given(latents=st.integers(1, 14))
def test_interpolation_equals_numpy_on_the_true_frame_positions(latents: int) -> None:
    num_frames = 4 * (latents - 1) + 1
    knots = [0.0] + [4 * k - 1.5 for k in range(1, latents)]
    expected = np.stack(
        [np.interp(np.arange(num_frames), knots, row) for row in np.eye(latents)], axis=-1
    )
    np.testing.assert_allclose(interpolation_weights(num_frames).numpy(), expected, atol=1e-12)


def test_a_signal_linear_in_time_survives_the_way_to_latents_and_back() -> None:
    ramp = torch.arange(49, dtype=torch.float64).view(49, 1, 1, 1)
    back = latents_to_frames(frames_to_latents(ramp)[None], 49)[0]
    inside = slice(0, 47)  # after the last knot, 46.5, the value is held
    torch.testing.assert_close(back[inside], ramp[inside])
    assert torch.equal(back[47:].flatten(), torch.tensor([46.5, 46.5], dtype=torch.float64))


@pytest.mark.parametrize("num_frames", [0, 4, 48])
def test_frame_counts_that_do_not_fit_the_vae_are_refused(num_frames: int) -> None:
    with pytest.raises(ValueError, match="4N\\+1"):
        latent_frame_of_frame(num_frames)


def test_latents_of_another_clip_length_are_refused() -> None:
    with pytest.raises(ValueError, match="13 latent frames, got 12"):
        latents_to_frames(torch.zeros(1, 12, 1, 1, 1), 49)


def test_a_ramp_across_the_picture_stays_one_on_the_token_grid() -> None:
    """Cell centres of both grids lie at (i + 0.5) / n of the picture."""
    columns = (torch.arange(64) + 0.5) / 64
    features = columns.expand(1, 1, 64, 64)
    found = resample_to_grid(features, 30, 45)
    expected = (torch.arange(45) + 0.5) / 45
    assert found.shape == (1, 30, 45, 1)
    # a shift by half a token (align_corners=True, say) would be 0.011 off
    torch.testing.assert_close(found[0, 15, 2:-2, 0], expected[2:-2], atol=1e-3, rtol=0)
