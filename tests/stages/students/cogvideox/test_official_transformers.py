"""Official models at full size on the meta device, with the run's own student and step."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from stages.clips.config import ClipsConfig
from stages.students.cogvideox.rotary import rotary_positions
from stages.students.official_models import official_configs
from stages.train_student.config import TrainConfig
from stages.train_student.step import TrainingStep
from stages.train_student.step_costs import (
    _run,
    meta_batch,
    meta_student,
    step_cost,
)

META = torch.device("meta")
USUAL = ClipsConfig(path=Path("unused"))
LARGE = ClipsConfig(path=Path("unused"), num_frames=81, height=768, width=1360)

# Weights; tokens in time, height and width at the model's usual size; x0's and the image's scale.
FACTS = {
    "cogvideox-2b": (1_693_783_872, (13, 30, 45), 1.15258426, 1.15258426),
    "cogvideox-5b": (5_570_283_072, (13, 30, 45), 0.7, 0.7),
    # As its safetensors index publishes, the learned positions (a buffer) included.
    "cogvideox-5b-i2v": (5_625_087_552, (13, 30, 45), 0.7, 0.7),
    "cogvideox1.5-5b": (5_570_676_352, (11, 48, 85), 0.7, 1 / 0.7),
    "cogvideox1.5-5b-i2v": (5_571_594_880, (11, 48, 85), 0.7, 1 / 0.7),
}


@pytest.fixture(params=FACTS)
def name(request):
    return request.param


@pytest.fixture
def configs(name):
    return official_configs(name)


@pytest.fixture
def size(name):
    return LARGE if "1.5" in name else USUAL


def shallow(configs, blocks=2):
    return type(configs)(
        folder=configs.folder,
        transformer=configs.transformer | {"num_layers": blocks},
        vae=configs.vae,
        scheduler=configs.scheduler,
    )


def test_weights_are_as_many_as_published(name, configs):
    with META:
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
    saved = sum(tensor.numel() for tensor in transformer.state_dict().values())
    assert saved == FACTS[name][0]


def test_token_grid_positions_and_scales_are_the_models(name, configs, size):
    _, grid, scale, image_scale = FACTS[name]
    latents = size.num_latent_frames, *size.latent_size
    assert configs.token_grid(*latents) == grid
    assert (configs.latent_scale, configs.image_latent_scale) == pytest.approx((scale, image_scale))
    assert configs.padding(size.num_latent_frames) == ("1.5" in name)
    assert configs.image_to_video == name.endswith("i2v")
    assert configs.ofs == (2.0 if name == "cogvideox1.5-5b-i2v" else None)
    padded = latents[0] + configs.padding(latents[0])
    rotary = rotary_positions(configs.transformer, padded, *latents[1:], META)
    if name == "cogvideox-2b":
        assert rotary is None
    else:
        tokens = grid[0] * grid[1] * grid[2]
        assert [tuple(part.shape) for part in rotary] == [(tokens, 64)] * 2


def test_a_step_at_the_usual_size_goes_forward_and_backward(name, configs, size):
    few = shallow(configs)
    config = TrainConfig(objectives=(), gradient_checkpointing=False)
    student = meta_student(config, few)
    batch = meta_batch(config, few, size, None, None)
    seen = []
    student.transformer.register_forward_hook(
        lambda module, given, output: seen.append(output[0].shape)
    )
    losses = TrainingStep(few, (), device=META, dtype=torch.bfloat16)(student, batch, 0)
    losses.total.backward()
    padded = size.num_latent_frames + configs.padding(size.num_latent_frames)
    assert seen == [(1, padded, 16, *size.latent_size)]
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained.values())
    # Rank times (in + out) for each of the four projections of each block.
    width = configs.transformer["num_attention_heads"] * 64
    assert sum(p.numel() for p in trained.values()) == 2 * 4 * 128 * 2 * width


def test_a_5b_step_costs_what_its_products_cost():
    configs = official_configs("cogvideox-5b")
    cost = step_cost(TrainConfig(objectives=(), lora={"rank": 1}), configs, USUAL)
    tokens, width, blocks = 226 + 13 * 30 * 45, 3072, 42
    linear = 2 * tokens * 12 * width**2  # four projections, and two layers of four times the width
    attention = 2 * 2 * tokens**2 * width
    # Forward, and backward to the inputs alone: weights are frozen.
    expected = blocks * (2 * linear + 3 * attention)
    assert cost.model_flops_per_clip == pytest.approx(expected, rel=0.01)
    again = blocks * (linear + attention + attention / 2)
    assert cost.flops_per_clip == pytest.approx(expected + again, rel=0.02)
    # Each block's input is kept, in bf16.
    assert cost.activation_bytes > blocks * tokens * width * 2


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_few_blocks_tell_of_many(checkpointing):
    """Against a run through all of them."""
    configs = shallow(official_configs("cogvideox-2b"), 7)
    small = ClipsConfig(path=Path("unused"), num_frames=9, height=64, width=96)
    config = TrainConfig(objectives=(), gradient_checkpointing=checkpointing)
    told = step_cost(config, configs, small)
    whole = _run(config, configs, 7, meta_batch(config, configs, small, None, None), None)
    assert told.flops_per_clip == whole.flops
    assert told.activation_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
