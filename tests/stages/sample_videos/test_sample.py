import logging
import shutil
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stages.clips import read_video
from stages.config import BaseModelConfig
from stages.progress import SilentProgress
from stages.sample_videos import sample
from stages.sample_videos.runs import LORA_FILE
from stages.sample_videos.sample import image_mismatch, sample_videos


@pytest.fixture
def drawn(monkeypatch):
    """The frames before H.264, which would blur small differences."""
    kept = []

    def keep(path, frames_THWC, fps):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        kept.append(frames_THWC)

    monkeypatch.setattr(sample, "write_video", keep)
    return kept


def draw(config, base, clips, tmp_path, *, run=None, prompt="a person walks", image=None, **update):
    (summary,) = sample_videos(
        config.model_copy(update=update),
        base,
        clips,
        run_dir=run,
        prompts=[prompt],
        image=image,
        outs=[tmp_path / "video.mp4"],
        progress=SilentProgress(),
    )
    return summary


def reference(base, config, clips, *, lora=None, lora_scale=1.0):
    """The same video from diffusers alone."""
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(base.path)
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


def test_the_base_alone_draws_what_diffusers_draws(config, base, clips, tmp_path, drawn):
    summary = draw(config, base, clips, tmp_path)
    assert summary.weights == "base"
    assert drawn[0].shape == (9, clips.height, clips.width, 3)
    assert close(drawn[0], reference(base, config, clips))


def test_a_prompt_that_is_too_long_is_told_once(config, base, clips, tmp_path, drawn, caplog):
    libraries = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for library in libraries:
        library.addHandler(caplog.handler)
    try:
        draw(config, base, clips, tmp_path, prompt="a person walks " * 40)
    finally:
        for library in libraries:
            library.removeHandler(caplog.handler)
    (told,) = [text for text in caplog.messages if "max" in text]
    assert "was truncated" in told


def test_adapters_act_with_alpha_over_rank(config, base, clips, tmp_path, drawn, lora_run):
    """Against the update added to the weights by hand."""
    run = lora_run(alpha=4.0, rank=2)
    assert draw(config, base, clips, tmp_path, run=run).weights == "lora"
    assert close(drawn[0], reference(base, config, clips, lora=run, lora_scale=2.0))
    assert not close(drawn[0], reference(base, config, clips))
    assert not close(drawn[0], reference(base, config, clips, lora=run, lora_scale=1.0))


@pytest.mark.parametrize("kinds", [{"use_dora": True}, {"use_rslora": True}])
def test_every_kind_of_adapter_arrives(config, base, clips, tmp_path, drawn, lora_run, kinds):
    """Against the merged weights by hand: alpha over sqrt(rank), rows of the trained length."""
    run = lora_run(alpha=4.0, rank=4, **kinds)
    draw(config, base, clips, tmp_path, run=run)
    scale = 4.0 / (2.0 if "use_rslora" in kinds else 4.0)
    assert close(drawn[0], reference(base, config, clips, lora=run, lora_scale=scale))
    assert not close(drawn[0], reference(base, config, clips))


def test_a_folder_that_export_wrote_is_drawn_from_directly(
    config, base, clips, tmp_path, drawn, lora_run, full_run
):
    for run in (lora_run(), full_run()):
        draw(config, base, clips, tmp_path, run=run)
        moved = (run / "export").rename(tmp_path / f"{run.name}-elsewhere")
        draw(config, base, clips, tmp_path, run=moved)
        assert (drawn[-1] == drawn[-2]).all()


def test_a_fully_tuned_transformer_takes_the_bases_place(
    config, base, clips, tmp_path, drawn, full_run
):
    run = full_run()
    assert draw(config, base, clips, tmp_path, run=run).weights == "full"
    assert not close(drawn[0], reference(base, config, clips))


def test_seed_decides_the_video(config, base, clips, tmp_path, drawn):
    for seed in (0, 0, 1):
        draw(config, base, clips, tmp_path, seed=seed)
    assert (drawn[0] == drawn[1]).all()
    assert not close(drawn[0], drawn[2])


def test_length_may_differ_from_the_clips(config, base, clips, tmp_path, drawn):
    assert draw(config, base, clips, tmp_path, num_frames=17).num_frames == 17
    assert len(drawn[0]) == 17


def test_the_file_is_a_video_at_the_clips_rate(config, base, clips, tmp_path):
    summary = draw(config, base, clips, tmp_path)
    frames_THWC, fps = read_video(summary.out)
    assert frames_THWC.shape == (9, clips.height, clips.width, 3)
    assert fps == summary.fps == 8


def test_progress_has_one_step_per_denoising_step(config, base, clips, tmp_path, drawn):
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

    (_,) = sample_videos(
        config,
        base,
        clips,
        run_dir=None,
        prompts=["x"],
        image=None,
        outs=[tmp_path / "v.mp4"],
        progress=Counting(),
    )
    assert counts["denoise"] == [2, 2]


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
        self, config, image_base, clips, tmp_path, drawn, picture
    ):
        assert image_mismatch(image_base, picture) is None
        draw(config, image_base, clips, tmp_path, image=picture)
        Image.new("L", (48, 32)).save(tmp_path / "black.png")
        draw(config, image_base, clips, tmp_path, image=tmp_path / "black.png")
        assert not close(*drawn)

    def test_needs_an_image(self, config, image_base, clips, tmp_path):
        with pytest.raises(ValueError, match="is an image-to-video model; add --image FILE"):
            draw(config, image_base, clips, tmp_path)

    def test_a_file_that_is_no_image_is_refused(self, config, image_base, clips, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(ValueError, match="cannot read the image"):
            draw(config, image_base, clips, tmp_path, image=tmp_path / "text.png")

    def test_text_to_video_refuses_an_image(self, config, base, clips, tmp_path, picture):
        assert image_mismatch(base, None) is None
        with pytest.raises(ValueError, match="is a text-to-video model; remove --image"):
            draw(config, base, clips, tmp_path, image=picture)


class TestUnfittingRuns:
    def test_adapters_of_another_width(self, config, base, clips, tmp_path, lora_run):
        run = lora_run()
        file = run / "export" / LORA_FILE
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        widened = {n: t.repeat(1, 2) if "lora_A" in n else t for n, t in load_file(file).items()}
        save_file(widened, file, metadata)
        with pytest.raises(ValueError, match=r"lora_A.weight has width 64, .* has 32"):
            draw(config, base, clips, tmp_path, run=run)

    def test_adapters_of_modules_that_are_not_there(self, config, base, clips, tmp_path, lora_run):
        run = lora_run()
        file = run / "export" / LORA_FILE
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        renamed = {n.replace("blocks.1", "blocks.7"): t for n, t in load_file(file).items()}
        save_file(renamed, file, metadata)
        with pytest.raises(ValueError, match=r"blocks\.7.*which the base model does not have"):
            draw(config, base, clips, tmp_path, run=run)

    def test_a_transformer_of_another_architecture(self, config, base, clips, tmp_path, full_run):
        run = full_run("deeper", num_layers=3)
        with pytest.raises(ValueError, match="num_layers 3 instead of 2"):
            draw(config, base, clips, tmp_path, run=run)

    def test_a_transformer_with_weights_missing(self, config, base, clips, tmp_path, full_run):
        run = full_run()
        file = run / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        del weights["proj_out.weight"]
        save_file(weights, file)
        with pytest.raises(
            ValueError, match=r"not a complete transformer; export .* missing: 1 \(proj_out\.weight"
        ):
            draw(config, base, clips, tmp_path, run=run)

    @pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "transformer"])
    def test_a_base_model_with_files_missing(self, config, base, clips, tmp_path, part):
        copy = shutil.copytree(base.path, tmp_path / "copy")
        for file in (copy / part).glob("*"):
            if file.suffix == ".safetensors" or file.name == "tokenizer.json":
                file.unlink()
        with pytest.raises(ValueError, match=rf"copy/{part} has no .*download the model again"):
            draw(config, BaseModelConfig(path=str(copy)), clips, tmp_path)

    def test_a_run_without_export(self, config, base, clips, tmp_path):
        with pytest.raises(ValueError, match="has no export/ yet"):
            draw(config, base, clips, tmp_path, run=tmp_path)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"cpu_offload": True}, "cpu_offload moves models to a GPU"),
        ({"device": "toaster"}, r"sample\.device=toaster is not a torch device"),
        ({"prompt": " "}, "the prompt is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, base, clips, tmp_path, update, message):
    with pytest.raises(ValueError, match=message):
        draw(config, base, clips, tmp_path, **update)


def test_a_pipeline_of_another_family_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match=r"is a WanPipeline; model\.path must be one of"):
        image_mismatch(BaseModelConfig(path=str(tmp_path)), None)


def test_a_video_that_is_not_finite_is_not_written(config, base, clips, tmp_path, full_run):
    run = full_run()
    file = run / "export" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"] += torch.inf
    save_file(weights, file)
    with pytest.raises(ValueError, match="NaN or infinite"):
        draw(config, base, clips, tmp_path, run=run)
    assert not (tmp_path / "video.mp4").exists()
