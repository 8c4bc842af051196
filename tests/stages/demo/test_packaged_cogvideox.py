"""The packaged base models: files, architecture, and what they know of unseen clips."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    DiffusionPipeline,
)

from stages.demo.build import PRETRAINED, copy_packaged_cogvideox
from stages.demo.tiny_cogvideox import build_tiny_cogvideox, build_tiny_vae
from stages.demo.training import transformer, vae
from stages.demo.training.drawn_clips import (
    HEIGHT,
    HELD_OUT_SEEDS,
    NUM_FRAMES,
    WIDTH,
    draw_demo_clip,
)
from stages.students.cogvideox.diffusion import cumulative_alphas, noisy_latents
from stages.students.cogvideox.inputs import image_condition

UNSEEN = HELD_OUT_SEEDS[-2:]
"""Neither trained on nor scored when the models were made."""
TIMESTEP = 800


def test_the_packaged_models_hold_no_pickles_and_no_code():
    files = [file for file in PRETRAINED.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors", ".yaml"}


def test_the_packaged_models_take_at_most_25_megabytes():
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("*") if file.is_file()) < 25e6


@pytest.fixture(params=[False, True], ids=["t2v", "i2v"])
def image_to_video(request):
    return request.param


@pytest.fixture
def folder(tmp_path, image_to_video):
    copy_packaged_cogvideox(tmp_path, image_to_video=image_to_video)
    return tmp_path


def test_the_packaged_pipelines_have_the_architecture_that_the_scripts_train(
    folder, image_to_video, tmp_path_factory
):
    built = tmp_path_factory.mktemp("built")
    build_tiny_cogvideox(
        built,
        height=HEIGHT,
        width=WIDTH,
        num_frames=NUM_FRAMES,
        captions=["a biped walks"],
        seed=0,
        image_to_video=image_to_video,
        vae=build_tiny_vae(
            0, widths=vae.WIDTHS, latent_channels=vae.LATENT_CHANNELS, norm_groups=vae.NORM_GROUPS
        ),
        num_layers=transformer.LAYERS,
        num_heads=transformer.HEADS,
        head_width=transformer.HEAD_WIDTH,
    )
    for part in ("transformer", "vae"):
        packaged, new = (
            json.loads((one / part / "config.json").read_text()) for one in (folder, built)
        )
        packaged.pop("scaling_factor", None)  # measured after training
        assert {key: new[key] for key in packaged} == packaged


def test_the_packaged_vae_restores_unseen_clips():
    model = AutoencoderKLCogVideoX.from_pretrained(
        PRETRAINED / "cogvideox" / "vae", torch_dtype=torch.float32
    )
    (seed, _) = UNSEEN
    assert vae.held_out_psnr(model, draw_demo_clip(seed, fps=vae.FPS).frames_THWC) > 26


@cache
def unseen_clips():
    return [draw_demo_clip(seed, fps=vae.FPS) for seed in UNSEEN]


def test_a_packaged_transformer_denoises_unseen_clips(folder, image_to_video):
    """Far better than guessing the mean, and better with the clip's caption than another's."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert type(pipeline) is (
        CogVideoXImageToVideoPipeline if image_to_video else CogVideoXPipeline
    )
    pixels = vae.as_pixels(np.stack([clip.frames_THWC for clip in unseen_clips()]))
    scale = pipeline.vae.config.scaling_factor
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        clean = pipeline.vae.encode(pixels).latent_dist.mode().transpose(1, 2) * scale
        noise = torch.randn(clean.shape, generator=random)
        abar = cumulative_alphas(pipeline.scheduler.config).float()[[TIMESTEP, TIMESTEP]]
        inputs = noisy = noisy_latents(clean, noise, abar)
        if image_to_video:
            images = pipeline.vae.encode(pixels[:, :, :1]).latent_dist.mode().transpose(1, 2)
            conditions = [image_condition(image * scale, clean.shape[1]) for image in images]
            inputs = torch.cat([noisy, torch.stack(conditions)], dim=2)
        text = torch.cat(
            [
                pipeline.encode_prompt(
                    clip.caption, do_classifier_free_guidance=False, max_sequence_length=32
                )[0]
                for clip in unseen_clips()
            ]
        )
        a = abar.view(2, 1, 1, 1, 1)

        def error(text):
            velocity = pipeline.transformer(
                hidden_states=inputs,
                encoder_hidden_states=text,
                timestep=torch.tensor([TIMESTEP, TIMESTEP]),
                image_rotary_emb=pipeline._prepare_rotary_positional_embeddings(
                    HEIGHT, WIDTH, clean.shape[1], "cpu"
                ),
                return_dict=False,
            )[0]
            return (a.sqrt() * noisy - (1 - a).sqrt() * velocity - clean).square().mean().item()

        channel_means = clean.mean(dim=(0, 1, 3, 4), keepdim=True)
        assert error(text) < 0.5 * (clean - channel_means).square().mean().item()
        if not image_to_video:
            assert error(text) < error(text.flip(0))
