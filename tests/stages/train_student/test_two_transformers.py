"""A tiny Wan 2.2 A14B: each transformer trained on its timesteps, and both sampled together."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from stages.config import BaseModelConfig
from stages.demo.tiny_wan import build_tiny_wan
from stages.progress import SilentProgress
from stages.students.experts import trained_configs
from stages.students.weights import hash_transformer
from stages.train_student.checkpoints.export import export_checkpoint
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import CachedSamples, join_batches
from stages.train_student.setup import open_checked_stores
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
    """A run of each expert of the text-to-video model, from the same stores."""
    validation = {"clips": 1}
    of_expert = {"high-noise": [700, 999], "low-noise": [0, 698]}
    made = {}
    for expert in EXPERTS:
        run_dir = world.root / "runs" / expert
        timesteps = validation | {"timesteps": of_expert[expert]}
        made[expert] = fit(run_dir, "t2v", expert, validation=timesteps)
    return made


@pytest.mark.parametrize("base", ["t2v", "i2v"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_the_loss_is_that_of_the_experts_transformer_on_its_timesteps(
    tiny, world, fit, runs, tmp_path, base, expert
):
    """By hand from the samples of the first step, in the whole transformer of diffusers."""
    run_dir = world.root / "runs" / expert
    if base == "t2v":
        found = runs[expert].first.diffusion
    else:
        run_dir = tmp_path / "run"
        found = fit(run_dir, base, expert).first.diffusion
    model = BaseModelConfig(path=str(world.bases[base]), expert=expert)
    configs = trained_configs(model)
    config = TrainConfig(**tiny.train_settings(run_dir, **SETTINGS))
    held_out = int(base == "t2v")
    stores = open_checked_stores(config, tiny.CLIPS, configs, world.cache, held_out=held_out)
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
    assert found == pytest.approx(expected, rel=1e-4)


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
        run_dir = world.root / "runs" / expert
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
            world.root / "runs" / "high-noise",
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
