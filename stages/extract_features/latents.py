"""Extraction of the latents store: the VAE posterior of each clip, and of its first frame for
image-to-video.
"""

# Legend: T frame, F latent frame, B batch (always 1), C channel, H W pixels or latent grid.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import Clip, ClipRecord, ClipsConfig, load_clip
from stages.extract_features.config import Kind, LatentsConfig
from stages.extract_features.extraction import Extracted, Outcome, clip_settings
from stages.files.hashes import sha256_of_folder
from stages.files.weight_checks import load_model
from stages.precision import DTYPES
from stages.students.latents import encode_posterior
from stages.students.student import FirstFrameEncoder, StudentConfigs


class LatentsExtraction:
    """Encodes each clip with the VAE and stores mean and standard deviation for sampling.

    The values are the VAE's own, not yet scaled for the transformer.

    Args:
        config: Precision, tiling and noisy draws.
        clips: Size and length of clips.
        base: Configuration of the base pipeline.
        seed: Seed of the noise on first frames, together with the clip's key.

    Raises:
        ValueError: The folder holds no VAE, or one of another compression than the clips'.
    """

    clips_per_batch = 1

    def __init__(
        self, config: LatentsConfig, clips: ClipsConfig, base: StudentConfigs, *, seed: int
    ) -> None:
        self._config = config
        self.size: ClipsConfig | None = clips
        self._clips = clips
        self._folder: Path = base.folder / "vae"
        self._seed = seed
        self._base = base
        base.check_vae()
        self.settings: Mapping[Kind, StoreSettings] = {"latents": self._settings(base)}

    def _settings(self, base: StudentConfigs) -> StoreSettings:
        values: dict[str, JSON] = {
            "clips": clip_settings(self._clips),
            "base": {
                "vae_sha256": sha256_of_folder(self._folder),
                **base.latents_settings(),
            },
            "precision": self._config.precision,
            "tiling": self._config.tiling,
        }
        values |= base.first_frame_settings(seed=self._seed, draws=self._config.image_draws)
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
        vae = load_model(self._base.model_class("vae"), self._folder, torch_dtype=dtype)
        vae.requires_grad_(False).eval().to(device)
        if self._config.tiling:
            vae.enable_tiling()
        encode_first_frame = None
        if self._base.image_to_video:
            encode_first_frame = self._base.first_frame_encoder(
                vae, device, seed=self._seed, draws=self._config.image_draws
            )
        yield lambda clips: [
            {"latents": self._extract(vae, encode_first_frame, clip)} for clip in clips
        ]

    @torch.inference_mode()
    def _extract(
        self, vae: Any, encode_first_frame: FirstFrameEncoder | None, clip: Clip
    ) -> Extracted:
        pixels_BCTHW = pixels_for_vae(clip.frames_THWC)
        mean, std = encode_posterior(vae, pixels_BCTHW)
        arrays = {"mean": mean, "std": std}
        if encode_first_frame is not None:
            arrays |= encode_first_frame(pixels_BCTHW, clip.key)
        attributes: dict[str, JSON] = {
            "num_frames": len(clip.frames_THWC),
            "geometry": dict(clip.geometry.as_dict()),
        }
        return Extracted(arrays=arrays, attributes=attributes)


def pixels_for_vae(frames_THWC: np.ndarray) -> torch.Tensor:
    """uint8 frames -> [1, 3, T, H, W] float32 from -1 to 1."""
    pixels_THWC = torch.from_numpy(frames_THWC).float() / 255 * 2 - 1
    return pixels_THWC.permute(3, 0, 1, 2)[None]


def latents_arrays(
    config: LatentsConfig, clips: ClipsConfig, base: StudentConfigs
) -> dict[str, ArraySpec]:
    """Return the array specs of a clip."""
    spec = ArraySpec(
        dtype="float16",
        shape=(clips.num_latent_frames, base.latent_channels, *clips.latent_size),
        dimension_names=("f", "c", "h", "w"),
    )
    arrays = dict.fromkeys(("mean", "std"), spec)
    return arrays | base.first_frame_arrays(clips, draws=config.image_draws)
