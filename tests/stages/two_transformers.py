"""A tiny pipeline of two transformers, as Wan 2.2 A14B, made from a tiny Wan 2.1."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

_CONDITION = 8
"""Channels of the mask and of the first frame's latents."""


def write_two_transformers(
    wan: Path, out: Path, *, image_to_video: bool = False, boundary_ratio: float = 0.875
) -> Path:
    """Write a pipeline with the parts of a text-to-video one and two transformers of their own.

    As in the official models, the image-to-video transformers take no states of CLIP.
    """
    shutil.copytree(wan, out, ignore=shutil.ignore_patterns("transformer"))
    config = dict(WanTransformer3DModel.load_config(wan / "transformer"))
    if image_to_video:
        config["in_channels"] += _CONDITION
    for seed, part in enumerate(("transformer", "transformer_2"), start=1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            WanTransformer3DModel.from_config(config).save_pretrained(out / part)
    file = out / "model_index.json"
    index = json.loads(file.read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": boundary_ratio}
    if image_to_video:
        index["_class_name"] = "WanImageToVideoPipeline"
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    file.write_text(json.dumps(index))
    return out
