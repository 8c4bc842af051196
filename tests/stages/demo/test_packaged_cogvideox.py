import json

import numpy as np
import torch
from diffusers import CogVideoXPipeline

from stages.cogvideox.diffusion import cumulative_alphas, noisy_latents
from stages.demo import draw_clip
from stages.demo.build import PRETRAINED
from stages.demo.tiny_cogvideox import build_tiny_cogvideox

COGVIDEOX = PRETRAINED / "cogvideox"


def test_the_carried_models_hold_no_pickles_and_no_code():
    assert {file.suffix for file in PRETRAINED.rglob("*") if file.is_file()} == {
        ".json",
        ".safetensors",
        ".yaml",
    }


def test_the_carried_base_model_has_the_architecture_of_build_tiny_cogvideox(tmp_path):
    build_tiny_cogvideox(
        tmp_path, height=128, width=192, num_frames=17, captions=["a biped walks"], seed=0
    )
    for part in ("transformer", "vae"):
        carried, built = (
            json.loads((folder / part / "config.json").read_text())
            for folder in (COGVIDEOX, tmp_path)
        )
        carried.pop("scaling_factor", None)  # measured after fitting
        assert {key: built[key] for key in carried} == carried


def test_the_carried_base_model_has_learnt_the_demos_clips():
    """It denoises them, latents in and out, far better than guessing the mean would."""
    pipeline = CogVideoXPipeline.from_pretrained(COGVIDEOX, torch_dtype=torch.float32)
    clips = [draw_clip(seed, num_frames=17, height=128, width=192, fps=8.0) for seed in (0, 1)]
    pixels = torch.from_numpy(np.stack([clip.frames_THWC for clip in clips]))
    scale = pipeline.vae.config.scaling_factor
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        encoded = pipeline.vae.encode(pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
        clean = encoded.latent_dist.mode().transpose(1, 2) * scale
        noise = torch.randn(clean.shape, generator=random)
        abar = cumulative_alphas(pipeline.scheduler.config).float()[[800, 800]]
        noisy = noisy_latents(clean, noise, abar)
        text = [
            pipeline.encode_prompt(
                clip.caption, do_classifier_free_guidance=False, max_sequence_length=32
            )[0]
            for clip in clips
        ]
        velocity = pipeline.transformer(
            hidden_states=noisy,
            encoder_hidden_states=torch.cat(text),
            timestep=torch.tensor([800, 800]),
            image_rotary_emb=pipeline._prepare_rotary_positional_embeddings(128, 192, 5, "cpu"),
            return_dict=False,
        )[0]
    a = abar.view(2, 1, 1, 1, 1)
    restored = a.sqrt() * noisy - (1 - a).sqrt() * velocity
    channel_means = clean.mean(dim=(0, 1, 3, 4), keepdim=True)
    assert (restored - clean).square().mean() < 0.4 * (clean - channel_means).square().mean()
