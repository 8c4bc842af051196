"""Drawn clips as latents of the demo's VAE, kept in files beside it."""

# Legend: N clip, T frame, F latent frame, C channel, H W pixels or latent grid.

import copy
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file
from torch import Tensor

from stages.demo.training.drawn_clips import draw_demo_clip
from stages.demo.training.run import progress_bar
from stages.demo.training.vae import FPS, as_pixels
from stages.files.tensor_files import save_tensors

_CLIPS_PER_FILE = 50

EncodedClips = dict[str, Tensor]
"""mean_NFCHW, std_NFCHW: scaled posterior; image_N1CHW: posterior mean of the first frame alone;
figure_NFHW: whether a latent is at or beside the figure."""


class ClipEncoder:
    """Draws and encodes clips; those whose files are in the VAE's folder are not encoded again."""

    def __init__(
        self, vae: AutoencoderKLCogVideoX, folder: Path, *, height: int, width: int, device: str
    ) -> None:
        self._vae = copy.deepcopy(vae).to(device, torch.bfloat16)
        self._folder = folder
        self._size = {"height": height, "width": width}
        self._weights = [weight.numpy().tobytes() for weight in vae.state_dict().values()]

    def encoded(
        self, seeds: Sequence[int], *, from_end: bool = False
    ) -> tuple[EncodedClips, list[str]]:
        """Latents and captions of the seeds' clips, on the CPU."""
        files = self._folder / f"encoded-{self.digest(seeds)}"
        files.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(seeds), _CLIPS_PER_FILE)
        captions: dict[int, list[str]] = {}
        figures: dict[int, Tensor] = {}
        with progress_bar("encode clips", len(seeds)) as task:
            for start in reversed(starts) if from_end else starts:
                drawn = [
                    draw_demo_clip(seed, fps=FPS, **self._size)
                    for seed in seeds[start : start + _CLIPS_PER_FILE]
                ]
                captions[start] = [clip.caption for clip in drawn]
                figures[start] = torch.stack([_figure_latents(clip.masks_THW) for clip in drawn])
                file = files / f"{start:06d}.safetensors"
                if not file.exists():
                    encoded = [self._encode(clip.frames_THWC) for clip in drawn]
                    partial = file.with_suffix(f".{os.getpid()}.partial")
                    save_tensors(
                        {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]},
                        partial,
                    )
                    partial.rename(file)
                task.advance(len(drawn))
        parts = [load_file(files / f"{start:06d}.safetensors") for start in starts]
        clips = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        clips["figure_NFHW"] = torch.cat([figures[start] for start in starts])
        return clips, [caption for start in starts for caption in captions[start]]

    def digest(self, seeds: Sequence[int]) -> str:
        """Identify the VAE's weights and the clips encoded with it."""
        digest = hashlib.sha256(repr((self._size, list(seeds))).encode())
        for weight in self._weights:
            digest.update(weight)
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def _encode(self, frames_THWC: Any) -> EncodedClips:
        """float16, of one clip; the VAE is in bfloat16."""
        pixels_1CTHW = as_pixels(frames_THWC[None]).to(self._vae.device, torch.bfloat16)
        posterior = self._vae.encode(pixels_1CTHW).latent_dist
        image = self._vae.encode(pixels_1CTHW[:, :, :1]).latent_dist.mean
        values = {"mean_NFCHW": posterior.mean, "std_NFCHW": posterior.std, "image_N1CHW": image}
        scale = self._vae.config.scaling_factor
        return {
            name: (value.float() * scale).transpose(1, 2).half().cpu()
            for name, value in values.items()
        }


def _figure_latents(masks_THW: Any) -> Tensor:
    """Whether a latent or its neighbour sees the figure in one of its frames: bool [F, H, W]."""
    masks_1THW = torch.from_numpy(masks_THW).float()[None]
    in_cell_1THW = F.max_pool3d(masks_1THW, (1, 8, 8))
    of_latents_1FHW = torch.cat(
        [in_cell_1THW[:, :1], F.max_pool3d(in_cell_1THW[:, 1:], (4, 1, 1))], dim=1
    )
    return F.max_pool3d(of_latents_1FHW, (1, 3, 3), stride=1, padding=(0, 1, 1))[0] > 0
