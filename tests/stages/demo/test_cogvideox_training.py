"""Training of the demo's VAE and transformers, on small clips."""

import json

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, DiffusionPipeline
from safetensors.torch import load_file

from stages.demo import draw_clip
from stages.demo.training import drawn_clips, transformer, vae
from stages.demo.training.run import TrainingRun

HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 9
SIZE = {"height": HEIGHT, "width": WIDTH}


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    small = {
        drawn_clips: {"NUM_FRAMES": NUM_FRAMES},
        vae: {
            "WIDTHS": (8, 8, 8, 8), "NORM_GROUPS": 4, "_CROP": 32, "_IMAGE_BATCH": 2,
            "_CLIP_BATCH": 1, "_SCALE_CLIPS": 1,
        },
        transformer: {
            "NUM_FRAMES": NUM_FRAMES, "LAYERS": 1, "HEADS": 2, "HEAD_WIDTH": 32,
        },
    }  # fmt: skip
    for module, values in small.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


class StoppedError(Exception):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Runs a function that is killed at a training step."""

    def run(step, function, *arguments, **settings):
        update = TrainingRun.update

        def update_until_killed(self, loss, *, rate):
            if self.done == step:
                raise StoppedError
            update(self, loss, rate=rate)

        with monkeypatch.context() as patched:
            patched.setattr(TrainingRun, "update", update_until_killed)
            with pytest.raises(StoppedError):
                function(*arguments, **settings)

    monkeypatch.setattr("stages.demo.training.run._CHECKPOINT_EVERY", 2)
    return run


@pytest.mark.slow
def test_a_stopped_vae_run_ends_with_the_same_weights(tmp_path, killed_at):
    settings = {"steps": 4, "seed": 0, "held_out_clips": 1, **SIZE}
    vae.train(tmp_path / "whole", **settings)
    killed_at(3, vae.train, tmp_path / "stopped", **settings)
    vae.train(tmp_path / "stopped", **settings)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_vae_training_lowers_the_error_and_sets_the_scale(tmp_path):
    vae.train(tmp_path / "short", steps=1, seed=0, held_out_clips=1, **SIZE)
    vae.train(tmp_path / "long", steps=12, seed=0, held_out_clips=1, **SIZE)
    short, long = (
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("short", "long")
    )
    assert long["held_out"]["psnr_db"]["16 fps"] > short["held_out"]["psnr_db"]["16 fps"]
    trained = vae.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "long")
    clip = draw_clip(7, num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH, fps=16.0)
    with torch.no_grad():
        latents = trained.float().encode(vae.as_pixels(clip.frames_THWC[None])).latent_dist.sample()
    assert (latents * trained.config.scaling_factor).std().item() == pytest.approx(1, rel=0.2)


def test_psnr_is_that_of_the_definition():
    class Brighter:
        """Restores every frame with 0.1 added, a twentieth of the range of pixels."""

        def encode(self, pixels):
            self.latent_dist = self
            self.mode = lambda: pixels
            return self

        def decode(self, pixels):
            self.sample = pixels.clamp(-1, 0.9) + 0.1
            return self

    frames_THWC = drawn_clips.draw_demo_clip(3, fps=8.0, **SIZE).frames_THWC
    pixels = vae.as_pixels(frames_THWC[None]).double().numpy()
    error = np.minimum(pixels, 0.9) + 0.1 - pixels
    expected = -10 * np.log10((error**2).mean() / 4)
    assert vae.held_out_psnr(Brighter(), frames_THWC) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("image_to_video", [False, True], ids=["t2v", "i2v"])
@pytest.mark.slow
def test_a_stopped_transformer_run_ends_with_the_same_pipeline(tmp_path, killed_at, image_to_video):
    vae.train(tmp_path / "vae", steps=1, seed=0, held_out_clips=1, **SIZE)
    settings = {
        **SIZE,
        "image_to_video": image_to_video,
        "num_clips": 3,
        "steps": 4,
        "seed": 0,
        "held_out_clips": 1,
    }
    transformer.train(tmp_path / "whole", tmp_path / "vae", **settings)
    killed_at(3, transformer.train, tmp_path / "stopped", tmp_path / "vae", **settings)
    transformer.train(tmp_path / "stopped", tmp_path / "vae", **settings)
    weights = [
        load_file(tmp_path / run / "transformer" / "diffusion_pytorch_model.safetensors")
        for run in ("whole", "stopped")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipeline) is (
        CogVideoXImageToVideoPipeline if image_to_video else CogVideoXPipeline
    )
    with pytest.raises(ValueError, match="'steps': 4"):
        transformer.train(tmp_path / "whole", tmp_path / "vae", **{**settings, "steps": 5})
