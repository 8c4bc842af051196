"""A tiny Wan 2.2 A14B: each transformer trained on its timesteps, and both sampled together."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from PIL import Image

from stages.config import BaseModelConfig
from stages.demo.tiny_wan import build_tiny_wan
from stages.progress import SilentProgress
from stages.sample_videos.sample import open_video_model
from stages.students.experts import trained_configs
from stages.students.weights import hash_transformer
from stages.train_student.checkpoints.export import export_checkpoint
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import CachedSamples, join_batches
from stages.train_student.setup import open_checked_stores
from tests.stages.sampling import SAMPLING, plain_video, sample_frames
from tests.stages.two_transformers import write_two_transformers

PROMPT = "an ellipse drifts"
EXPERTS = ("high-noise", "low-noise")
PARTS = {"high-noise": "transformer", "low-noise": "transformer_2"}
RANGES = {"high-noise": range(699, 1000), "low-noise": range(699)}
SETTINGS = {
    "steps": 1,
    "report_to": [],
    "objectives": [],
    "optimizer": {"learning_rate": 0.1, "warmup_steps": 0},
}


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Text- and image-to-video pipelines of two transformers, and one cache for both."""
    root = tmp_path_factory.mktemp("two")
    build_tiny_wan(root / "wan", captions=[PROMPT], seed=0)
    bases = {
        name: write_two_transformers(root / "wan", root / name, image_to_video=name == "i2v")
        for name in ("t2v", "i2v")
    }
    configs = trained_configs(BaseModelConfig(path=str(bases["i2v"]), expert="high-noise"))
    tiny.write_store(
        root / "cache",
        "text",
        {"embeds": configs.text_shape},
        values={"base": configs.text_settings()},
    )
    of_image = configs.first_frame_arrays(tiny.CLIPS, draws=1)
    tiny.write_store(
        root / "cache",
        "latents",
        tiny.LATENT_SHAPES | {name: spec.shape for name, spec in of_image.items()},
        values={"base": configs.latents_settings()},
    )
    return SimpleNamespace(root=root, bases=bases, cache=root / "cache")


@pytest.fixture(scope="module")
def fit(tiny, world):
    """Train an expert: fit(run_dir, base, expert, **changed settings) -> TrainSummary."""
    from stages.train_student.train import train_student

    def run(run_dir, base, expert, **changes):
        return train_student(
            TrainConfig(**tiny.train_settings(run_dir, **SETTINGS | changes)),
            tiny.CLIPS,
            BaseModelConfig(path=str(world.bases[base]), expert=expert),
            world.cache,
            resolved_config={"model": {"expert": expert}},
            provenance={},
            progress=SilentProgress(),
        )

    return run


@pytest.fixture(scope="module")
def runs(world, fit):
    """A run of each expert of each model, from the same stores, in a folder of the model."""
    timesteps = {"high-noise": [700, 999], "low-noise": [0, 698]}
    return {
        (base, expert): fit(
            world.root / "runs" / base / expert,
            base,
            expert,
            validation={"clips": 1, "timesteps": timesteps[expert]},
        )
        for base in ("t2v", "i2v")
        for expert in EXPERTS
    }


@pytest.mark.parametrize("base", ["t2v", "i2v"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_the_loss_is_that_of_the_experts_transformer_on_its_timesteps(
    tiny, world, runs, base, expert
):
    """By hand from the samples of the first step, in the whole transformer of diffusers."""
    configs = trained_configs(BaseModelConfig(path=str(world.bases[base]), expert=expert))
    config = TrainConfig(**tiny.train_settings("unused", **SETTINGS))
    stores = open_checked_stores(config, tiny.CLIPS, configs, world.cache, held_out=1)
    samples = CachedSamples(stores.stores, configs, seed=0, batch_size=2)
    batch = join_batches([samples[0], samples[1]])
    assert all(timestep in RANGES[expert] for timestep in batch.timestep_B.tolist())
    transformer = WanTransformer3DModel.from_pretrained(world.bases[base] / PARTS[expert])
    share = (batch.timestep_B.double() + 1) / 1000
    sigma = (3 * share / (1 + 2 * share)).view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * batch.clean_BFCHW + sigma * batch.noise_BFCHW
    if base == "i2v":
        noisy = torch.cat([noisy, batch.image_BFCHW], dim=2)
        assert batch.image_BLD is None
    with torch.no_grad():
        predicted = transformer(
            hidden_states=noisy.transpose(1, 2).float(),
            timestep=(1000 * sigma.flatten()).float(),
            encoder_hidden_states=batch.text_BLD.float(),
        ).sample.transpose(1, 2)
    expected = (predicted - (batch.noise_BFCHW - batch.clean_BFCHW)).square().mean().item()
    assert runs[base, expert].first.diffusion == pytest.approx(expected, rel=1e-4)


def test_drawn_timesteps_fill_the_experts_range(tiny, world):
    config = TrainConfig(**tiny.train_settings("unused", objectives=[]))
    for expert in EXPERTS:
        configs = trained_configs(BaseModelConfig(path=str(world.bases["t2v"]), expert=expert))
        stores = open_checked_stores(config, tiny.CLIPS, configs, world.cache)
        samples = CachedSamples(stores.stores, configs, seed=0, batch_size=2)
        found = [int(samples[number].timestep_B) for number in range(200)]
        drawn = RANGES[expert]
        assert drawn.start <= min(found) < drawn.start + 30
        assert drawn.stop - 30 <= max(found) < drawn.stop


def test_a_run_and_its_exports_name_the_expert(world, runs, tmp_path):
    for expert in EXPERTS:
        run_dir = world.root / "runs" / "t2v" / expert
        settings = json.loads((run_dir / "run.json").read_text())["settings"]
        assert settings["model.expert"] == expert
        assert settings["model.boundary_ratio"] == 0.875
        assert settings["model.weights"] == hash_transformer(world.bases["t2v"], PARTS[expert])
        again = export_checkpoint(run_dir, None, tmp_path / expert)
        assert again.expert == expert
        for folder in (run_dir / "export", again.folder):
            assert json.loads((folder / "export.json").read_text())["expert"] == expert


def test_a_run_is_not_resumed_with_the_other_expert(world, fit, runs):
    with pytest.raises(ValueError, match=r"model.expert was 'high-noise', is 'low-noise'"):
        fit(
            world.root / "runs" / "t2v" / "high-noise",
            "t2v",
            "low-noise",
            validation={"clips": 1, "timesteps": [5]},
        )


@pytest.mark.parametrize(
    ("expert", "settings", "told"),
    [
        (
            "high-noise",
            {"validation": {"clips": 1}},
            r"train.validation.timesteps must be one or more of 699 to 999, those of the "
            r"high-noise transformer, .* 900\]; \[729, 789, 849, 910, 970\] is usual",
        ),
        (
            "low-noise",
            {"objectives": ["lgf"], "lgf": {"timesteps": [700, 999]}},
            r"train.lgf.timesteps is \[700, 999\], but training draws 0 to 698, those of the low",
        ),
        (
            "low-noise",
            {"samples": {"prompts": [PROMPT]}},
            "train.samples.prompts needs both transformers",
        ),
    ],
)
def test_settings_of_the_other_transformer_are_refused(
    world, fit, tmp_path, expert, settings, told
):
    with pytest.raises(ValueError, match=told):
        fit(tmp_path / "run", "t2v", expert, **settings)
    assert not (tmp_path / "run").exists()


def test_only_the_transformer_that_is_trained_is_read(tiny, world, fit, tmp_path):
    """The other one's weights need not be there."""
    base = shutil.copytree(world.bases["t2v"], tmp_path / "base")
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    world.bases["one"] = base
    summary = fit(tmp_path / "run", "one", "low-noise")
    assert np.isfinite(summary.last.diffusion)


# Of SAMPLING's two steps, one is of each transformer.


@pytest.fixture(scope="module")
def picture(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("first") / "first.png"
    pixels = np.random.default_rng(0).integers(0, 256, (tiny.HEIGHT, tiny.WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def plain_wan(tiny, base, picture, exports):
    """uint8 [T, H, W, 3]: the video of diffusers' pipeline with adapters, by expert."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    if "high-noise" in exports:
        pipeline.load_lora_weights(exports["high-noise"])
    if "low-noise" in exports:
        pipeline.load_lora_weights(exports["low-noise"], load_into_transformer_2=True)
    return plain_video(
        pipeline, tiny, **({} if picture is None else {"image": Image.open(picture)})
    )


@pytest.mark.parametrize(
    ("base", "experts"),
    [("t2v", EXPERTS[:1]), ("t2v", EXPERTS[1:]), ("t2v", EXPERTS), ("i2v", EXPERTS)],
)
def test_videos_are_those_of_plain_diffusers_with_the_same_adapters(
    tiny, world, runs, picture, base, experts
):
    """With the run of one transformer, and with both."""
    folder, image = world.root / "runs" / base, picture if base == "i2v" else None
    run_dir = folder if experts == EXPERTS else folder / experts[0]
    model = BaseModelConfig(path=str(world.bases[base]))
    frames_THWC = sample_frames(SAMPLING, model, tiny.CLIPS, run_dir=run_dir, image=image)
    exports = {expert: folder / expert / "export" for expert in experts}
    assert np.array_equal(frames_THWC, plain_wan(tiny, world.bases[base], image, exports))
    # Each adapter has an effect that is seen.
    if base == "t2v" and experts == EXPERTS:
        for expert in EXPERTS:
            fewer = {one: export for one, export in exports.items() if one != expert}
            less_THWC = plain_wan(tiny, world.bases[base], image, fewer)
            assert not np.array_equal(frames_THWC, less_THWC)


def test_a_model_says_what_of_it_is_trained(tiny, world, runs):
    folder = world.root / "runs" / "t2v"
    model = BaseModelConfig(path=str(world.bases["t2v"]))

    def opened(run_dir):
        return open_video_model(SAMPLING, model, tiny.CLIPS, run_dir=run_dir)

    both, high, base = opened(folder), opened(folder / "high-noise"), opened(None)
    assert [one.weights for one in (both, high, base)] == ["lora", "lora", "base"]
    assert both.name == "t2v" and set(both.exports) == {"transformer", "transformer_2"}
    assert both.warning is None and base.warning is None
    assert "the low-noise one is the base model's" in high.warning
    settings = [one.settings for one in (both, high, base, opened(folder / "low-noise"))]
    assert all(one != other for one, other in itertools.combinations(settings, 2))
    assert all(one["boundary_ratio"] == 0.875 for one in settings)


def test_a_whole_transformer_takes_the_place_of_its_own(tiny, world, runs, tmp_path):
    """The low-noise one, as an export of full tuning."""
    export = tmp_path / "run" / "export"
    trained = WanTransformer3DModel.from_pretrained(world.bases["t2v"] / "transformer_2")
    torch.nn.init.normal_(trained.proj_out.weight, std=0.5)
    trained.save_pretrained(export / "transformer")
    (export / "export.json").write_text(json.dumps({"expert": "low-noise", "files": {}}))
    model = BaseModelConfig(path=str(world.bases["t2v"]))
    frames_THWC = sample_frames(SAMPLING, model, tiny.CLIPS, run_dir=tmp_path / "run")
    base = shutil.copytree(world.bases["t2v"], tmp_path / "base")
    trained.save_pretrained(base / "transformer_2")
    assert np.array_equal(frames_THWC, plain_wan(tiny, base, None, {}))


def test_runs_that_do_not_fit_the_transformers_are_refused(tiny, world, runs, tmp_path):
    def refuse(base, run_dir, told):
        model = BaseModelConfig(path=str(world.root / base))
        with pytest.raises(ValueError, match=told):
            open_video_model(SAMPLING, model, tiny.CLIPS, run_dir=run_dir)

    low = world.root / "runs" / "t2v" / "low-noise"
    refuse("wan", low, "holds the low-noise transformer of a model with two")
    twice = tmp_path / "twice"
    for name in EXPERTS:
        shutil.copytree(low, twice / name)
    refuse("t2v", twice, "both hold the low-noise transformer")
    export = shutil.copytree(low / "export", tmp_path / "export")
    about = json.loads((export / "export.json").read_text())
    for expert, told in (("middle", "expert is 'middle'"), (None, "does not say which of the two")):
        (export / "export.json").write_text(json.dumps(about | {"expert": expert}))
        refuse("t2v", export, told)
