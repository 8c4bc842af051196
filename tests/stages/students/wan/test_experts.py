"""Wan 2.2 A14B: which transformer is trained at which timesteps, against diffusers' pipelines."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from stages.config import BaseModelConfig
from stages.students.experts import trained_configs
from stages.students.registry import read_configs
from stages.students.wan.flow import FlowSchedule
from stages.students.weights import hash_transformer, sampling_parts

SCHEDULERS = {
    "UniPCMultistepScheduler": {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    },
    "FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": False},
}


class Recorder:
    """Stands for a transformer of a pipeline; remembers the timesteps it is called with."""

    def __init__(self, transformer):
        self.config, self.dtype = transformer.config, torch.float32
        self.called_at = []

    def cache_context(self, name, **about):
        return nullcontext()

    def __call__(self, hidden_states, timestep, **inputs):
        self.called_at.append(float(timestep[0]))
        return (hidden_states[:, :4],)


class Timesteps:
    """A scheduler that visits given timesteps and changes nothing."""

    order = 1
    config = SimpleNamespace(num_train_timesteps=1000)

    def __init__(self, timesteps):
        self.timesteps, self.sigmas = timesteps, timesteps / 1000

    def set_timesteps(self, steps, device):
        assert steps == len(self.timesteps)

    def set_begin_index(self, index):
        pass

    def step(self, prediction, t, latents, return_dict):
        return (latents,)


@pytest.fixture(scope="module")
def pipelines(two_bases):
    """The pipelines of diffusers, each with two recorders."""
    made = {}
    for name, folder in two_bases.items():
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.transformer = Recorder(pipeline.transformer)
        pipeline.transformer_2 = Recorder(pipeline.transformer_2)
        made[name] = pipeline
    return made


def calls(pipeline, timesteps):
    """The timesteps at which a pipeline calls its first and its second transformer."""
    pipeline.scheduler = Timesteps(timesteps)
    recorders = pipeline.transformer, pipeline.transformer_2
    for recorder in recorders:
        recorder.called_at.clear()
    of_image = {}
    if "image" in type(pipeline).__call__.__annotations__:
        of_image["image"] = Image.fromarray(np.zeros((32, 48, 3), np.uint8))
    pipeline(
        prompt_embeds=torch.zeros(1, 512, 16),
        height=32,
        width=48,
        num_frames=9,
        guidance_scale=1.0,
        num_inference_steps=len(timesteps),
        output_type="latent",
        **of_image,
    )
    return [recorder.called_at for recorder in recorders]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("name", "shift", "ratio"),
    [
        ("t2v", 3.0, 0.875),  # a timestep of the schedule lies on the boundary
        ("i2v", 3.0, 0.9),
        ("t2v", 12.0, 0.875),
        ("t2v", 5.0, 0.8755),  # UniPC's integers pass this boundary later
    ],
)
def test_an_expert_has_the_timesteps_at_which_the_pipeline_calls_it(
    two_bases, pipelines, scheduler, name, shift, ratio
):
    of_shift = {"shift": shift, "flow_shift": shift, "num_train_timesteps": 1000}
    config = SCHEDULERS[scheduler] | of_shift | {"_class_name": scheduler}
    high, low = (
        replace(read_configs(two_bases[name], expert), scheduler=config, boundary_ratio=ratio)
        for expert in ("high-noise", "low-noise")
    )
    first = high.trained_timesteps.start
    assert [*low.trained_timesteps, *high.trained_timesteps] == list(range(1000))
    near = [0, *range(first - 3, first + 3), 999]
    levels = FlowSchedule(config, torch.device("cpu")).model_timestep(torch.tensor(near))
    if scheduler.startswith("UniPC"):
        levels = levels.to(torch.int64)
    pipeline = pipelines[name]
    pipeline.register_to_config(boundary_ratio=ratio)
    of_first, of_second = calls(pipeline, levels)
    assert of_first == [float(level) for level, at in zip(levels, near, strict=True) if at >= first]
    assert of_second == [float(level) for level, at in zip(levels, near, strict=True) if at < first]


def test_the_official_boundaries_at_the_official_shift(two_bases):
    """By hand: sigma = 3 s / (1 + 2 s) is 0.875 at s = 0.7, and 0.9 at s = 0.75."""
    for name, first in (("t2v", 699), ("i2v", 749)):
        assert read_configs(two_bases[name], "high-noise").trained_timesteps == range(first, 1000)
        assert read_configs(two_bases[name], "low-noise").trained_timesteps == range(first)
        assert read_configs(two_bases[name]).trained_timesteps == range(1000)


def test_each_expert_is_the_transformer_of_its_folder(two_bases, tmp_path):
    base = shutil.copytree(two_bases["t2v"], tmp_path / "base")
    file = base / "transformer_2" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eps": 1e-5}))
    found = {}
    for expert in ("high-noise", "low-noise"):
        configs = trained_configs(BaseModelConfig(path=str(base), expert=expert))
        found[configs.transformer_part] = configs.transformer["eps"]
    assert found == {"transformer": 1e-6, "transformer_2": 1e-5}
    assert hash_transformer(base) != hash_transformer(base, "transformer_2")
    assert {"transformer", "transformer_2"} < set(sampling_parts(base))


def test_image_to_video_takes_mask_and_latents_alone(two_bases, wan_bases):
    configs = read_configs(two_bases["i2v"])
    assert configs.image_to_video and configs.condition_channels == 8
    assert configs.image_embeds_shape is None
    assert configs.first_frame_settings(seed=0, draws=1) == {}
    # A store of Wan 2.1's latents has CLIP's states too.
    stored = {"image_latents": torch.rand(3, 4, 4, 6), "image_embeds": torch.rand(5, 16)}
    condition = configs.condition(stored, 3, torch.Generator())
    of_clip = read_configs(wan_bases["i2v"]).condition(stored, 3, torch.Generator())
    assert torch.equal(condition.channels_FCHW, of_clip.channels_FCHW)
    assert condition.embeds_LD is None and of_clip.embeds_LD is not None


def test_the_two_transformers_differ(two_bases):
    """Else no test here could tell one from the other."""
    first, second = (
        safe_open(two_bases["t2v"] / part / "diffusion_pytorch_model.safetensors", "pt")
        for part in ("transformer", "transformer_2")
    )
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(first.get_tensor(name), second.get_tensor(name))


def test_a_model_with_two_transformers_needs_an_expert_and_no_other_takes_one(wan_bases, two_bases):
    with pytest.raises(ValueError, match=r"set model\.expert to high-noise or"):
        trained_configs(BaseModelConfig(path=str(two_bases["t2v"])))
    for expert in ("high-noise", "low-noise"):
        model = BaseModelConfig(path=str(wan_bases["t2v"]), expert=expert)
        with pytest.raises(ValueError, match=r"two transformers.*has one: set model.expert=null"):
            trained_configs(model)
    assert trained_configs(BaseModelConfig(path=str(wan_bases["t2v"]))).expert is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"boundary_ratio": None}, "transformer_2 and boundary_ratio belong together"),
        ({"transformer_2": [None, None]}, "transformer_2 and boundary_ratio belong together"),
        ({"boundary_ratio": 875}, "between 0 and 1, got 875"),
        ({"boundary_ratio": True}, "between 0 and 1, got True"),
        ({"transformer_2": ["diffusers", "WanVACETransformer3DModel"]}, "transformer_2 is .*VACE"),
        ({"expand_timesteps": True}, "TI2V-5B.* not supported yet"),
    ],
)
def test_a_damaged_index_is_refused(two_bases, tmp_path, changes, told):
    index = json.loads((two_bases["t2v"] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    with pytest.raises(ValueError, match=told):
        read_configs(tmp_path)
