"""Official Wan models at full size on the meta device, with the run's own student and step."""

from pathlib import Path

import pytest
import torch

from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig
from stages.students.official_models import configs_for_estimate, official_configs
from stages.students.registry import with_blocks
from stages.students.wan.official_models import NAMES
from stages.train_student.config import TrainConfig
from stages.train_student.step import TrainingStep
from stages.train_student.step_costs import meta_batch, meta_student, step_cost

META = torch.device("meta")
USUAL = ClipsConfig(path=Path("unused"), num_frames=81, height=480, width=832, fps=16.0)
GRID = (21, 30, 52)
TEXT, TEXT_WIDTH, FREQUENCIES, IMAGE = 512, 4096, 256, (257, 1280)

# Width, width of the feed-forward layers, blocks, input channels.
FACTS = {
    "wan2.1-t2v-1.3b-diffusers": (1536, 8960, 30, 16),
    "wan2.1-t2v-14b-diffusers": (5120, 13824, 40, 16),
    "wan2.1-i2v-14b-480p-diffusers": (5120, 13824, 40, 36),
    "wan2.1-i2v-14b-720p-diffusers": (5120, 13824, 40, 36),
    "wan2.2-t2v-a14b-diffusers": (5120, 13824, 40, 16),
    "wan2.2-i2v-a14b-diffusers": (5120, 13824, 40, 36),
}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def linear(inputs, outputs):
    return (inputs + 1) * outputs


def takes_clip(name):
    return name.startswith("wan2.1-i2v")


def weights_of(width, hidden, blocks, channels, *, clip):
    """Parameters by hand, from Wan's description: patches of 1x2x2, six modulations per block."""
    attention = 4 * linear(width, width) + 2 * width  # projections, norms of q and k
    feed_forward = linear(width, hidden) + linear(hidden, width)
    block = 2 * attention + 2 * width + feed_forward + 6 * width  # with an affine norm between
    of_image = 0
    if clip:
        block += 2 * linear(width, width) + width  # keys and values of the image, norm of k
        image = IMAGE[1]
        of_image = 2 * image + linear(image, image) + linear(image, width) + 2 * width
    embeddings = (
        linear(channels * 4, width)
        + linear(FREQUENCIES, width)
        + linear(width, width)
        + linear(width, 6 * width)
        + linear(TEXT_WIDTH, width)
        + linear(width, width)
    )
    return blocks * block + embeddings + of_image + linear(width, 16 * 4) + 2 * width


def test_weights_are_as_many_as_the_description_gives(name):
    with META:
        configs = official_configs(name)
        transformer = configs.model_class("transformer").from_config(configs.transformer)
    found = sum(parameter.numel() for parameter in transformer.parameters())
    assert found == weights_of(*FACTS[name], clip=takes_clip(name))
    published = {1536: 1.42e9, 5120: 16.4e9 if takes_clip(name) else 14.29e9}[FACTS[name][0]]
    assert found == pytest.approx(published, rel=0.01)


def test_a_step_at_the_usual_size_goes_forward_and_backward(name):
    configs = with_blocks(official_configs(name), 2)
    assert configs.image_to_video == ("i2v" in name)
    assert configs.image_embeds_shape == (IMAGE if takes_clip(name) else None)
    assert configs.text_shape == (TEXT, TEXT_WIDTH)
    latents = USUAL.num_latent_frames, *USUAL.latent_size
    assert configs.token_grid(*latents) == GRID
    config = TrainConfig(objectives=(), gradient_checkpointing=False)
    student = meta_student(config, configs)
    batch = meta_batch(config, configs, USUAL, None, None)
    seen = []
    student.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])),
        with_kwargs=True,
    )
    losses = TrainingStep(configs, (), device=META, dtype=torch.bfloat16)(student, batch, 0)
    losses.total.backward()
    ((given, output),) = seen
    assert given.shape == (1, FACTS[name][3], *latents)
    assert output.shape == (1, 16, *latents)
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained.values())
    # Rank times (in + out) for four projections of both attentions of each block.
    assert sum(p.numel() for p in trained.values()) == 2 * 8 * 128 * 2 * FACTS[name][0]


def test_a_step_of_the_small_model_costs_what_its_products_cost():
    configs = official_configs("wan2.1-t2v-1.3b-diffusers")
    cost = step_cost(TrainConfig(objectives=(), lora={"rank": 1}), configs, USUAL)
    width, hidden, blocks, _ = FACTS["wan2.1-t2v-1.3b-diffusers"]
    tokens = GRID[0] * GRID[1] * GRID[2]
    of_image = 2 * tokens * (6 * width**2 + 2 * width * hidden)
    of_text = 2 * TEXT * 2 * width**2
    attention = 2 * 2 * tokens * (tokens + TEXT) * width
    # Forward, and backward to the inputs alone: weights are frozen.
    expected = blocks * (2 * (of_image + of_text) + 3 * attention)
    assert cost.model_flops_per_clip == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("wan2.2")])
def test_both_transformers_of_wan_2_2_are_known(no_hub, name):
    """The pipeline's boundary, at the bundled shift of 3: by hand, 3 s / (1 + 2 s)."""
    first = {"wan2.2-t2v-a14b-diffusers": 699, "wan2.2-i2v-a14b-diffusers": 749}[name]
    found = {}
    for expert in ("high-noise", "low-noise"):
        model = BaseModelConfig(path=f"Wan-AI/{name}", expert=expert)
        configs, (note,) = configs_for_estimate(model)
        assert "is not on this machine yet" in note
        found[configs.transformer_part] = configs
    assert found["transformer"].trained_timesteps == range(first, 1000)
    assert found["transformer_2"].trained_timesteps == range(first)
    assert found["transformer"].transformer == found["transformer_2"].transformer


@pytest.mark.parametrize(
    "hub_id", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan-ai/wan2.1-t2v-14b-diffusers"]
)
def test_an_official_model_is_known_by_its_hub_id(no_hub, hub_id):
    configs, (note,) = configs_for_estimate(BaseModelConfig(path=hub_id), text_encoder=True)
    assert configs == official_configs(hub_id.lower().partition("/")[2])
    assert configs.text_encoder["d_model"] == configs.text_shape[1]
    assert f"{hub_id} is not on this machine yet" in note
