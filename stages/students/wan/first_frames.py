"""First frames of Wan image-to-video: latents of the frame before a grey clip, and CLIP's states.

Legend: B batch (always 1), C channel, T frame, F latent frame, H W pixels or latent grid, L token
of the image, D width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.files.weight_checks import load_model, read_config
from stages.students.latents import encode_posterior, to_float16

CLIP_TOKENS = 257
"""Tokens of the official models' image encoder, CLIP ViT-H/14 at 224 pixels."""


def clip_tokens(folder: Path) -> int:
    """Tokens of an image by the image encoder of a pipeline; the official number without one."""
    file = folder / "image_encoder" / "config.json"
    if not file.is_file():
        return CLIP_TOKENS
    config = read_config(file)
    return int((config["image_size"] // config["patch_size"]) ** 2 + 1)


def first_frame_clip(pixels_BCTHW: Tensor) -> Tensor:
    """The clip's first frame, and zeros (grey) for all others, as the pipeline encodes it."""
    clip_BCTHW = torch.zeros_like(pixels_BCTHW)
    clip_BCTHW[:, :, 0] = pixels_BCTHW[:, :, 0]
    return clip_BCTHW


def encode_latents(vae: Any, pixels_BCTHW: Tensor) -> np.ndarray:
    """The posterior's mean of `first_frame_clip`: float16 [F, C, H, W], not normalised."""
    mean_FCHW, _ = encode_posterior(vae, first_frame_clip(pixels_BCTHW))
    return mean_FCHW


class ImageEncoder:
    """CLIP's vision model of a pipeline, in float32 as in the official examples."""

    def __init__(self, folder: Path, model_class: Any, device: torch.device) -> None:
        """Load the model and its preprocessing.

        Raises:
            ValueError: A file is missing or damaged.
        """
        from transformers import CLIPImageProcessorPil

        values = folder / "image_processor" / "preprocessor_config.json"
        read_config(values)
        # The PIL processor gives the same values on every machine, with torchvision or without.
        self._processor = CLIPImageProcessorPil.from_pretrained(
            values.parent, local_files_only=True
        )
        model = load_model(model_class, folder / "image_encoder", dtype=torch.float32)
        self._model = model.requires_grad_(False).eval().to(device)

    def __call__(self, image_CHW: Tensor) -> np.ndarray:
        """States before the last layer: float16 [L, D].

        Args:
            image_CHW: -1 to 1.
        """
        values_HWC = ((image_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        inputs = self._processor(images=Image.fromarray(values_HWC), return_tensors="pt")
        states = self._model(inputs.pixel_values.to(self._model.device), output_hidden_states=True)
        return to_float16(states.hidden_states[-2][0])
