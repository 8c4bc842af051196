"""Extraction of the latents store: the VAE posterior of each clip, and of its first frame for
image-to-video.
"""

# Legend: T frame, F latent frame, N draw of noise, B batch (always 1), C channel, H W pixels or
# latent grid.

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import Clip, ClipRecord, ClipsConfig, load_clip
from stages.cogvideox.configs import VAE_SPATIAL_COMPRESSION, CogVideoXConfigs
from stages.cogvideox.weights import model_class_of
from stages.extract_features.config import Kind, LatentsConfig
from stages.extract_features.extraction import (
    Extracted,
    Outcome,
    clip_settings,
    to_float16,
)
from stages.files.hashes import sha256_of_folder
from stages.files.weight_checks import load_model
from stages.local_gram_flow.alignment import TEMPORAL_COMPRESSION
from stages.precision import DTYPES

_NOISE_LOG_MEAN, _NOISE_LOG_STD = -3.0, 0.5
"""Log-normal noise level on image-to-video first frames, from the training of CogVideoX."""


class LatentsExtraction:
    """Encodes each clip with the VAE and stores mean and standard deviation for sampling.

    The values are not multiplied by the VAE's scaling factor.

    Args:
        config: Precision, tiling and noisy draws.
        clips: Size and length of clips.
        base: Configuration of the base pipeline.
        seed: Seed of the noise on first frames, together with the clip's key.

    Raises:
        ValueError: The folder holds no VAE, or its compression differs from CogVideoX's.
    """

    clips_per_batch = 1

    def __init__(
        self, config: LatentsConfig, clips: ClipsConfig, base: CogVideoXConfigs, *, seed: int
    ) -> None:
        self._config = config
        self.size: ClipsConfig | None = clips
        self._clips = clips
        self._folder: Path = base.folder / "vae"
        self._seed = seed
        self._image_to_video = base.image_to_video
        _check_compression(base)
        self.settings: Mapping[Kind, StoreSettings] = {"latents": self._settings(base)}

    def _settings(self, base: CogVideoXConfigs) -> StoreSettings:
        values: dict[str, JSON] = {
            "clips": clip_settings(self._clips),
            "base": {
                "vae_sha256": sha256_of_folder(self._folder),
                "scaling_factor": base.vae["scaling_factor"],
                "invert_scale_latents": base.vae["invert_scale_latents"],
                "latent_channels": base.vae["latent_channels"],
            },
            "precision": self._config.precision,
            "tiling": self._config.tiling,
        }
        if self._image_to_video:
            values["image_noise"] = {
                "log_mean": _NOISE_LOG_MEAN,
                "log_std": _NOISE_LOG_STD,
                "seed": self._seed,
                "draws": self._config.image_draws,
            }
        arrays = latents_arrays(self._config, self._clips, base)
        return StoreSettings(kind="latents", arrays=arrays, values=values)

    def prepare(self, record: ClipRecord) -> Clip:
        """Decode the clip.

        Raises:
            ClipSkipped: See `load_clip`.
        """
        return load_clip(record, self._clips)

    @contextmanager
    def load_model(
        self, device: torch.device
    ) -> Iterator[Callable[[Sequence[Clip]], Sequence[Outcome]]]:
        """Load the VAE."""
        dtype = DTYPES[self._config.precision]
        vae = load_model(model_class_of("vae"), self._folder, torch_dtype=dtype)
        vae.requires_grad_(False).eval().to(device)
        if self._config.tiling:
            vae.enable_tiling()
        yield lambda clips: [{"latents": self._extract(vae, clip)} for clip in clips]

    @torch.inference_mode()
    def _extract(self, vae: Any, clip: Clip) -> Extracted:
        pixels_BCTHW = pixels_for_vae(clip.frames_THWC)
        mean, std = _posterior(vae, pixels_BCTHW)
        arrays = {"mean": mean, "std": std}
        if self._image_to_video:
            draws = [
                _posterior(vae, noisy_BCTHW)
                for noisy_BCTHW in image_noise_draws(
                    pixels_BCTHW[:, :, :1], clip.key, self._seed, self._config.image_draws
                )
            ]
            for name, of_draws in zip(
                ("image_mean", "image_std"), zip(*draws, strict=True), strict=True
            ):
                arrays[name] = np.concatenate(of_draws)
        attributes: dict[str, JSON] = {
            "num_frames": len(clip.frames_THWC),
            "geometry": dict(clip.geometry.as_dict()),
        }
        return Extracted(arrays=arrays, attributes=attributes)


def pixels_for_vae(frames_THWC: np.ndarray) -> torch.Tensor:
    """uint8 frames -> [1, 3, T, H, W] float32 from -1 to 1."""
    pixels_THWC = torch.from_numpy(frames_THWC).float() / 255 * 2 - 1
    return pixels_THWC.permute(3, 0, 1, 2)[None]


def image_noise_draws(
    image_BCTHW: torch.Tensor, key: str, seed: int, draws: int
) -> Iterator[torch.Tensor]:
    """Yield the image with N draws of CogVideoX's noise on first frames, sigma = exp(N(-3, 0.5)).

    CogVideoX draws sigma and noise anew at each step. Here they depend on the seed and the clip's
    key, not on the order of clips. The sigmas of a clip are stratified: one from each of N equally
    likely parts of the distribution, so that few draws cover its spread.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    noise = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    for draw in range(draws):
        uniform = (draw + torch.rand((), generator=noise, dtype=torch.float64)) / draws
        normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).float()
        sigma = torch.exp(_NOISE_LOG_MEAN + _NOISE_LOG_STD * normal)
        yield image_BCTHW + sigma * torch.randn(image_BCTHW.shape, generator=noise)


def _posterior(vae: Any, pixels_BCTHW: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation, [F, C, H, W] each."""
    posterior = vae.encode(pixels_BCTHW.to(vae.device, vae.dtype)).latent_dist
    mean_CFHW, std_CFHW = posterior.mean[0], posterior.std[0]
    return to_float16(mean_CFHW.transpose(0, 1)), to_float16(std_CFHW.transpose(0, 1))


def _check_compression(base: CogVideoXConfigs) -> None:
    halvings = len(base.vae["block_out_channels"]) - 1
    found = (base.vae["temporal_compression_ratio"], 2**halvings)
    wanted = (TEMPORAL_COMPRESSION, VAE_SPATIAL_COMPRESSION)
    if found != wanted:
        raise ValueError(
            f"the VAE in {base.folder} compresses time and space by {found}; a CogVideoX VAE "
            f"compresses by {wanted}"
        )


def latents_arrays(
    config: LatentsConfig, clips: ClipsConfig, base: CogVideoXConfigs
) -> dict[str, ArraySpec]:
    """Return the array specs of a clip."""
    per_frame = (int(base.vae["latent_channels"]), *clips.latent_size)
    arrays = dict.fromkeys(("mean", "std"), _spec("f", clips.num_latent_frames, per_frame))
    if base.image_to_video:
        spec = _spec("n", config.image_draws, per_frame)
        arrays |= dict.fromkeys(("image_mean", "image_std"), spec)
    return arrays


def _spec(dimension: str, length: int, per_frame: tuple[int, ...]) -> ArraySpec:
    return ArraySpec(
        dtype="float16",
        shape=(length, *per_frame),
        dimension_names=(dimension, "c", "h", "w"),
    )
