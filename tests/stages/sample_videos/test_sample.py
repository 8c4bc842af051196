import json
import logging
import math
import shutil
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stages.config import BaseModelConfig
from stages.progress import SilentProgress
from stages.sample_videos.requests import VideoRequest
from stages.sample_videos.runs import LORA_FILE
from stages.sample_videos.sample import (
    check_images,
    generate_videos,
    open_video_model,
    sampling_device,
)
from tests.stages.sampling import sample_frames

draw = sample_frames


def reference(base, config, clips, *, lora=None, lora_scale=1.0, change=lambda pipeline: None):
    """The same video from diffusers alone."""
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(base.path)
    change(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        weights = load_file(lora / "export" / LORA_FILE)
        for name in [name for name in weights if "lora_A" in name]:
            module = pipeline.transformer.get_submodule(
                name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            )
            update = weights[name.replace("lora_A", "lora_B")] @ weights[name]
            module.weight.data += lora_scale * update
            length_O = weights.get(name.replace("lora_A.weight", "lora_magnitude_vector"))
            if length_O is not None:
                module.weight.data *= (length_O / module.weight.data.norm(dim=1))[:, None]
    video = pipeline(
        prompt="a person walks",
        height=clips.height,
        width=clips.width,
        num_frames=clips.num_frames,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="np",
    ).frames[0]
    return (video * 255).round().astype(np.uint8)


def close(one, other):
    return np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_the_base_alone_draws_what_diffusers_draws(config, base, clips):
    drawn = draw(config, base, clips)
    assert drawn.shape == (9, clips.height, clips.width, 3)
    assert close(drawn, reference(base, config, clips))


def test_a_prompt_that_is_too_long_is_told_once(config, base, clips, caplog):
    libraries = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for library in libraries:
        library.addHandler(caplog.handler)
    try:
        draw(config, base, clips, prompt="a person walks " * 40)
    finally:
        for library in libraries:
            library.removeHandler(caplog.handler)
    (told,) = [text for text in caplog.messages if "max" in text]
    assert "was truncated" in told


def test_adapters_act_with_alpha_over_rank(config, base, clips, lora_run):
    """Against the update added to the weights by hand."""
    run = lora_run(alpha=4.0, rank=2)
    drawn = draw(config, base, clips, run_dir=run)
    assert close(drawn, reference(base, config, clips, lora=run, lora_scale=2.0))
    assert not close(drawn, reference(base, config, clips))
    assert not close(drawn, reference(base, config, clips, lora=run, lora_scale=1.0))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5])
def test_the_scale_of_adapters_multiplies_their_effect(config, base, clips, lora_run, scale):
    """Against the scaled update added to the weights by hand."""
    run = lora_run(alpha=4.0, rank=2)
    scaled = config.model_copy(update={"lora_scale": scale})
    drawn = draw(scaled, base, clips, run_dir=run)
    assert close(drawn, reference(base, config, clips, lora=run, lora_scale=2.0 * scale))
    assert not close(drawn, draw(config, base, clips, run_dir=run))


@pytest.mark.parametrize("kinds", [{"use_dora": True}, {"use_rslora": True}])
def test_every_kind_of_adapter_arrives(config, base, clips, lora_run, kinds):
    """Against the merged weights by hand: alpha over sqrt(rank), rows of the trained length."""
    run = lora_run(alpha=4.0, rank=4, **kinds)
    drawn = draw(config, base, clips, run_dir=run)
    scale = 4.0 / (2.0 if "use_rslora" in kinds else 4.0)
    assert close(drawn, reference(base, config, clips, lora=run, lora_scale=scale))
    assert not close(drawn, reference(base, config, clips))


def test_a_folder_that_export_wrote_is_drawn_from_directly(
    config, base, clips, tmp_path, lora_run, full_run
):
    for run in (lora_run(), full_run()):
        drawn = draw(config, base, clips, run_dir=run)
        moved = (run / "export").rename(tmp_path / f"{run.name}-elsewhere")
        assert (draw(config, base, clips, run_dir=moved) == drawn).all()


def test_a_fully_tuned_transformer_takes_the_bases_place(config, base, clips, full_run):
    model = open_video_model(config, base, clips, run_dir=full_run())
    assert model.weights == "full"
    drawn = draw(config, base, clips, run_dir=model.run_dir)
    assert not close(drawn, reference(base, config, clips))


def test_a_video_depends_on_its_own_request_only(config, base, clips):
    """The first and the last of a batch are the videos that each request gives alone."""
    requests = [VideoRequest(prompt="a cat", seed=seed) for seed in (0, 1, 0)]
    model = open_video_model(config, base, clips, run_dir=None)
    first, second, again = generate_videos(
        model, requests, device=torch.device("cpu"), progress=SilentProgress()
    )
    assert (first == again).all()
    assert np.abs(first - second).max() > 0.01
    (alone,) = generate_videos(
        model, requests[1:2], device=torch.device("cpu"), progress=SilentProgress()
    )
    assert (alone == second).all()


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("ddim", diffusers.CogVideoXDDIMScheduler), ("dpm", diffusers.CogVideoXDPMScheduler)],
)
def test_the_scheduler_is_the_one_of_the_official_scripts(config, base, clips, name, scheduler):
    """CogVideo's inference/cli_demo.py: from_config(…, timestep_spacing="trailing")."""
    config = config.model_copy(update={"scheduler": name, "steps": 4})

    def change(pipeline):
        pipeline.scheduler = scheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing"
        )

    drawn = draw(config, base, clips)
    assert close(drawn, reference(base, config, clips, change=change))
    other = config.model_copy(update={"scheduler": "dpm" if name == "ddim" else "ddim"})
    assert not close(drawn, draw(other, base, clips))


def test_dynamic_guidance_follows_the_timestep(config, base, clips, monkeypatch):
    """Against the formula of CogVideoX's pipeline, at the timesteps of the schedule."""
    seen = []

    class Recorded(diffusers.CogVideoXPipeline):
        @property
        def guidance_scale(self):
            seen.append(self._guidance_scale)
            return self._guidance_scale

    monkeypatch.setattr(diffusers, "CogVideoXPipeline", Recorded)
    config = config.model_copy(update={"dynamic_cfg": True, "steps": 4, "scheduler": "ddim"})
    draw(config, base, clips)
    timesteps = (999, 749, 499, 249)
    expected = [
        1 + 3.0 * (1 - math.cos(math.pi * ((4 - timestep) / 4) ** 5)) / 2 for timestep in timesteps
    ]
    assert seen == pytest.approx(expected)


def test_size_and_rate_may_differ_from_the_clips(config, base, clips):
    config = config.model_copy(update={"num_frames": 17, "height": 48, "width": 32, "fps": 12.5})
    model = open_video_model(config, base, clips, run_dir=None)
    assert (model.size.size_name, model.fps) == ("17x48x32", 12.5)
    assert draw(config, base, clips).shape == (17, 48, 32, 3)


def test_tiles_and_slices_are_set_on_the_vae(config, base, clips, monkeypatch):
    called = []
    vae = diffusers.AutoencoderKLCogVideoX
    for name in ("enable_tiling", "enable_slicing"):
        monkeypatch.setattr(vae, name, lambda self, name=name: called.append(name))
    draw(config, base, clips)
    assert not called
    draw(config.model_copy(update={"tiling": True}), base, clips)
    assert sorted(called) == ["enable_slicing", "enable_tiling"]


def test_progress_has_one_step_per_denoising_step(config, base, clips):
    counts = {}

    class Counting(SilentProgress):
        @contextmanager
        def task(self, description, total, **options):
            with super().task(description, total, **options) as task:
                counts[description] = [0, total]
                task.advance = lambda: counts[description].__setitem__(
                    0, counts[description][0] + 1
                )
                yield task

    draw(config, base, clips, progress=Counting())
    assert counts["base: denoise"] == [2, 2]


class TestImageToVideo:
    @pytest.fixture
    def image_base(self, bases):
        return BaseModelConfig(path=str(bases / "i2v"))

    @pytest.fixture
    def picture(self, tmp_path):
        path = tmp_path / "picture.png"
        noise = np.random.default_rng(0).integers(0, 255, (100, 70, 4), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        return path

    def test_draws_from_an_image_of_any_size_and_mode(
        self, config, image_base, clips, tmp_path, picture
    ):
        drawn = draw(config, image_base, clips, image=picture)
        Image.new("L", (48, 32)).save(tmp_path / "black.png")
        assert not close(drawn, draw(config, image_base, clips, image=tmp_path / "black.png"))

    def test_every_video_needs_an_image(self, config, image_base, clips, picture):
        model = open_video_model(config, image_base, clips, run_dir=None)
        requests = [VideoRequest(prompt=text, seed=0, image=picture) for text in "ab"]
        check_images(model, requests)
        requests.append(VideoRequest(prompt="a bird", seed=0))
        with pytest.raises(ValueError, match="the prompt 'a bird' has no image; add --image FILE"):
            check_images(model, requests)

    def test_a_file_that_is_no_image_is_refused(self, config, image_base, clips, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(ValueError, match="cannot read the image"):
            draw(config, image_base, clips, image=tmp_path / "text.png")

    def test_text_to_video_refuses_an_image(self, config, base, clips, picture):
        with pytest.raises(ValueError, match="is a text-to-video model; remove the image"):
            draw(config, base, clips, image=picture)


class TestUnfittingRuns:
    def test_adapters_of_another_width(self, config, base, clips, lora_run):
        run = lora_run()
        file = run / "export" / LORA_FILE
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        widened = {n: t.repeat(1, 2) if "lora_A" in n else t for n, t in load_file(file).items()}
        save_file(widened, file, metadata)
        with pytest.raises(ValueError, match=r"lora_A.weight has width 64, .* has 32"):
            draw(config, base, clips, run_dir=run)

    def test_adapters_of_modules_that_are_not_there(self, config, base, clips, lora_run):
        run = lora_run()
        file = run / "export" / LORA_FILE
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        renamed = {n.replace("blocks.1", "blocks.7"): t for n, t in load_file(file).items()}
        save_file(renamed, file, metadata)
        with pytest.raises(ValueError, match=r"blocks\.7.*which the base model does not have"):
            draw(config, base, clips, run_dir=run)

    def test_a_transformer_of_another_architecture(self, config, base, clips, full_run):
        run = full_run("deeper", num_layers=3)
        with pytest.raises(ValueError, match="num_layers 3 instead of 2"):
            draw(config, base, clips, run_dir=run)

    def test_a_transformer_with_weights_missing(self, config, base, clips, full_run):
        run = full_run()
        file = run / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        del weights["proj_out.weight"]
        save_file(weights, file)
        with pytest.raises(
            ValueError, match=r"not a complete transformer; export .* missing: 1 \(proj_out\.weight"
        ):
            draw(config, base, clips, run_dir=run)

    @pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "transformer"])
    def test_a_base_model_with_files_missing(self, config, base, clips, tmp_path, part):
        copy = shutil.copytree(base.path, tmp_path / "copy")
        for file in (copy / part).glob("*"):
            if file.suffix == ".safetensors" or file.name == "tokenizer.json":
                file.unlink()
        with pytest.raises(ValueError, match=rf"copy/{part} has no .*download the model again"):
            draw(config, BaseModelConfig(path=str(copy)), clips)

    def test_a_run_without_export(self, config, base, clips, tmp_path):
        with pytest.raises(ValueError, match="has no export/ yet"):
            draw(config, base, clips, run_dir=tmp_path)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"offload": "model"}, "offload=model moves models to a GPU"),
        ({"offload": "sequential"}, "offload=sequential moves models to a GPU"),
        ({"device": "toaster"}, r"sample\.device=toaster is not a torch device"),
    ],
)
def test_a_device_that_cannot_be_is_refused(config, update, message):
    with pytest.raises(ValueError, match=message):
        sampling_device(config.model_copy(update=update), local_rank=0)


@pytest.mark.parametrize(
    ("name", "device"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("auto", "cpu")]
)
def test_each_process_of_a_machine_has_its_own_gpu(config, monkeypatch, name, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = config.model_copy(update={"device": name})
    assert sampling_device(config, local_rank=3) == torch.device(device)


def test_a_whole_transformer_has_no_adapters_to_scale(config, base, clips, full_run):
    config = config.model_copy(update={"lora_scale": 0.5})
    with pytest.raises(ValueError, match=r"sample\.lora_scale=0\.5 cannot scale"):
        open_video_model(config, base, clips, run_dir=full_run())


def test_a_pipeline_of_another_family_is_refused(config, clips, base, tmp_path):
    copy = shutil.copytree(base.path, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text()) | {"_class_name": "LTXPipeline"}
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is a LTXPipeline; model\.path must be one of"):
        draw(config, BaseModelConfig(path=str(copy)), clips)


def test_a_video_that_is_not_finite_is_refused(config, base, clips, full_run):
    run = full_run()
    file = run / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"] += torch.inf
    save_file(weights, file)
    with pytest.raises(ValueError, match="NaN or infinite"):
        draw(config, base, clips, run_dir=run)
