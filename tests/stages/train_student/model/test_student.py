import pytest
import torch
from torch import nn
from torch.nn import functional

from stages.local_gram_flow import time_weights
from stages.students.registry import read_configs
from stages.train_student.config import TrainConfig
from stages.train_student.model.loading import build_student
from stages.train_student.model.student import (
    Downsampler,
    Projector,
    Student,
    TemporalConvolution,
)
from stages.train_student.objectives.build import build_heads
from stages.train_student.parallel.deepspeed import deepspeed_engine
from stages.train_student.parallel.process_group import process_group, world_from_environment


class KeepTokens(Projector):
    """A projector that hands the tokens on."""

    def forward(self, tokens_BJHWC, time_weights_TJ):
        return tokens_BJHWC


def heads_of(**projectors):
    return nn.ModuleDict(projectors)


@pytest.fixture(scope="module")
def inputs(tiny, base_model):
    torch.manual_seed(1)
    configs = read_configs(base_model)
    frames, _, height, width = tiny.LATENT
    of_clips = configs.transformer_inputs(
        torch.randn(2, *tiny.LATENT), torch.randn(2, *tiny.TEXT), torch.tensor([3, 700])
    )
    return (
        configs.shape_inputs(frames, height, width, torch.device("cpu")) | of_clips,
        configs.token_grid(frames, height, width),
        {"lgf": time_weights(9, 9), "mask": time_weights(9, 9)},
    )


def build(config, configs, **changes):
    return build_student(
        config,
        configs,
        torch.float32,
        heads=lambda: build_heads(config, configs, None),
        world=world_from_environment(),
        **changes,
    )


def test_tokens_are_the_images_alone_in_the_order_t_h_w(tiny, inputs):
    """With the block made the identity, its tokens are the patches: their place is known."""
    transformer = tiny.tiny_transformer().eval()
    for block in transformer.transformer_blocks:
        block.forward = lambda hidden_states, encoder_hidden_states, **kwargs: (
            hidden_states,
            encoder_hidden_states,
        )
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    heads = heads_of(lgf=KeepTokens(width, (1,), smooth=False))
    student = Student(transformer, heads, block=1)
    with torch.no_grad():
        tokens_BJHWC = student(*inputs)[1]["lgf"]
        patches = functional.conv2d(
            inputs[0]["hidden_states"].flatten(0, 1),
            transformer.patch_embed.proj.weight,
            transformer.patch_embed.proj.bias,
            stride=2,
        )
    assert tokens_BJHWC.shape == (2, 3, *tiny.GRID, width)
    expected = patches.unflatten(0, (2, 3)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(tokens_BJHWC, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_tap_takes_one_tensor_under_checkpointing_and_every_zero_stage(
    tiny, base_model, inputs, method, zero_stage, tmp_path
):
    configs = read_configs(base_model)

    def built(checkpointing, **changes):
        settings = tiny.train_settings(
            tmp_path,
            method=method,
            gradient_checkpointing=checkpointing,
            batch_size=1,
            objectives=["lgf", "mask"],
            deepspeed={"zero_stage": zero_stage},
        )
        config = TrainConfig(**settings)
        return config, build(config, configs, **changes)

    _, plain = built(checkpointing=False, zero_init=False)
    with torch.no_grad():
        expected = plain(*inputs)
    world = world_from_environment()
    with process_group(world):
        config, student = built(checkpointing=True)
        runs, captured = [], []
        block = student.transformer.transformer_blocks[1]
        block.register_forward_pre_hook(lambda module, given: runs.append(1))
        for head in student.heads.values():
            head.register_forward_pre_hook(lambda module, given: captured.append(given[0]))
        with deepspeed_engine(student, config, world) as engine:
            velocity, features = engine(*inputs)
            engine.backward(velocity.mean() + sum(f.mean() for f in features.values()))
            engine.step()
    assert len(runs) == 2, "checkpointing runs the block again in the backward pass"
    assert len(captured) == 2, "each head runs once"
    with pytest.raises(RuntimeError, match="has not run"):
        student._tap.take()
    torch.testing.assert_close(velocity, expected[0])
    assert features.keys() == expected[1].keys() == {"lgf", "mask"}
    for name in features:
        torch.testing.assert_close(features[name], expected[1][name])
    assert features["mask"].shape == (2, 9, *tiny.GRID, 1)


def test_lora_starts_without_effect_and_trains_adapters_and_heads_alone(
    tiny, base_model, inputs, tmp_path
):
    config = TrainConfig(**tiny.train_settings(tmp_path))
    configs = read_configs(base_model)
    student = build(config, configs)
    with torch.no_grad():
        velocity, _ = student(*inputs)
        untouched, _ = Student(tiny.tiny_transformer())(*inputs)
    assert torch.equal(velocity, untouched)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("heads.lgf.") for name in trained)
    assert sum("lora_A" in name for name in trained) == 2 * 4


def test_without_an_objective_there_is_no_head(tiny, base_model, inputs, tmp_path):
    config = TrainConfig(**tiny.train_settings(tmp_path, objectives=[]))
    configs = read_configs(base_model)
    student = build(config, configs)
    assert not student.heads
    assert student(*inputs)[1] == {}


def test_a_block_that_is_not_there_is_refused(tiny):
    transformer = tiny.tiny_transformer()
    with pytest.raises(ValueError, match="must be under 2"):
        Student(transformer, heads_of(lgf=Projector(32, (8,), smooth=False)), block=2)


def test_at_frame_rate_it_interpolates_and_starts_without_smoothing():
    torch.manual_seed(0)
    tokens_BJHWC = torch.randn(2, 3, 2, 2, 6)
    weights_TJ = time_weights(9, 9)
    projector = Projector(6, (8, 8, 4), smooth=True)
    without = Projector(6, (8, 8, 4), smooth=False)
    without.load_state_dict(projector.state_dict(), strict=False)
    torch.testing.assert_close(
        projector(tokens_BJHWC, weights_TJ),
        torch.einsum("tj,bjhwc->bthwc", weights_TJ, without(tokens_BJHWC, None)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_at_latent_rate_tokens_and_maps_correspond():
    assert time_weights(3, 9) is None
    projector = Projector(6, (8, 8, 4), smooth=False)
    assert projector(torch.randn(1, 3, 2, 2, 6), None).shape == (1, 3, 2, 2, 4)


def test_clips_of_other_lengths_pass_the_same_layers():
    """Each bucket has its own number of frames."""
    projector = Projector(6, (8, 4), smooth=True).bfloat16()
    for frames in (5, 9, 17):
        tokens_BJHWC = torch.randn(1, (frames - 1) // 4 + 1, 2, 3, 6).bfloat16()
        found = projector(tokens_BJHWC, time_weights(frames, frames))
        assert found.shape == (1, frames, 2, 3, 4)
        assert found.dtype == torch.bfloat16


def test_each_width_is_a_layer():
    layers = [m for m in Projector(6, (8, 7, 5, 3), smooth=False).layers if hasattr(m, "bias")]
    shapes = [tuple(m.weight.shape) for m in layers]
    assert shapes == [(8, 6), (8,), (7, 8), (7,), (5, 7), (5,), (3, 5)]


def test_temporal_convolution_equals_torch_with_repeated_ends():
    torch.manual_seed(0)
    ours = TemporalConvolution(5)
    features_BTHWC = torch.randn(2, 7, 2, 3, 5)
    assert torch.equal(ours(features_BTHWC), features_BTHWC)
    torch.nn.init.normal_(ours.taps_3C)
    theirs = torch.nn.Conv1d(5, 5, 3, padding=1, padding_mode="replicate", groups=5, bias=False)
    theirs.weight.data = ours.taps_3C.data.T[:, None]
    rows_NCT = features_BTHWC.permute(0, 2, 3, 4, 1).reshape(-1, 5, 7)
    expected = theirs(rows_NCT).view(2, 2, 3, 5, 7).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(ours(features_BTHWC), expected)


@pytest.mark.parametrize(("side", "grid"), [(3, (6, 9)), (2, (3, 5)), (1, (2, 3))])
def test_the_downsampler_is_a_convolution_with_stride_of_its_size(side, grid):
    torch.manual_seed(0)
    projector = Projector(6, (8, 4), smooth=True, downsample=side).double()
    without = Projector(6, (8, 4), smooth=True).double()
    without.load_state_dict(projector.state_dict(), strict=False)
    tokens_BJHWC = torch.randn(2, 3, *grid, 6).double()
    weights_TJ = time_weights(9, 9)
    linear = projector.downsampler.linear
    rows, columns = (-(-length // side) * side for length in grid)
    padded = torch.zeros(2, 9, rows, columns, 4).double()
    padded[:, :, : grid[0], : grid[1]] = without(tokens_BJHWC, weights_TJ)
    expected_NCHW = functional.conv2d(
        padded.flatten(0, 1).permute(0, 3, 1, 2),
        linear.weight.unflatten(1, (side, side, 4)).permute(0, 3, 1, 2),
        linear.bias,
        stride=side,
    )
    expected_BTHWC = expected_NCHW.permute(0, 2, 3, 1).unflatten(0, (2, 9))
    torch.testing.assert_close(projector(tokens_BJHWC, weights_TJ), expected_BTHWC)


def test_the_downsampler_starts_as_torchs_convolution_does():
    torch.manual_seed(0)
    ours = Downsampler(64, 3).linear
    theirs = torch.nn.Conv2d(64, 64, 3, stride=3)
    bound = (9 * 64) ** -0.5  # of a uniform distribution
    for drawn in (ours.weight, ours.bias, theirs.weight, theirs.bias):
        assert 0.9 * bound < drawn.abs().max() <= bound
        assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
