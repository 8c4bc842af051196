"""The tap on blocks of diffusers' video transformers."""

import diffusers
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stages.train_student.model.student import BlockTap

GRID = (2, 3, 4)
"""Tokens in time, height and width."""
CELL = (1, 2, 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_taps_tokens_are_what_the_next_block_receives_with_their_gradient(tiny, checkpointing):
    transformer = tiny.tiny_transformer(use_rotary_positional_embeddings=False).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    first, second = transformer.transformer_blocks
    received = []
    second.register_forward_pre_hook(
        lambda block, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    tap = BlockTap(first)
    latents_BFCHW, text_BLD = torch.randn(2, *tiny.LATENT), torch.randn(2, *tiny.TEXT)

    def predict():
        return transformer(latents_BFCHW, text_BLD, torch.tensor([3, 700]))[0]

    predict()  # outside of `with`: not captured
    with pytest.raises(RuntimeError, match="has not run inside"):
        tap.take()
    received.clear()
    with tap:
        predict()
    tokens_BND = tap.take()
    assert torch.equal(tokens_BND, received[0])
    tokens_BND.square().mean().backward()
    with pytest.raises(RuntimeError, match="has not run inside"):
        tap.take()  # nor is the recomputation in the backward pass
    assert all(p.grad is not None and p.grad.any() for p in first.ff.parameters())
    assert all(p.grad is None for p in second.parameters())


def test_a_tap_takes_hidden_states_alone_and_refuses_reentrant_checkpointing():
    block = nn.Linear(3, 3)
    tap = BlockTap(block)
    given = torch.randn(1, 2, 3, requires_grad=True)
    with tap:
        out = block(given)
    assert tap.take() is out
    with tap, pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(block, given, use_reentrant=True)
    with torch.no_grad(), tap:
        out = block(given)
    assert tap.take() is out


def wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
        rope_max_seq_len=32,
    ), {}


def hunyuan_video():
    return diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=10,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ), {
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
    }


def mochi():
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=5,
    ), {"encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)}


def ltx_video():
    return diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        caption_channels=16,
        num_layers=1,
    ), {
        "encoder_attention_mask": torch.ones(1, 5),
        "num_frames": GRID[0],
        "height": GRID[1],
        "width": GRID[2],
    }


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("build", [wan, hunyuan_video, mochi, ltx_video])
def test_tokens_of_other_transformers_are_the_videos_in_the_order_t_h_w(build):
    """Without attention between tokens, a change of one place changes the token of that place."""
    torch.manual_seed(0)
    transformer, inputs = build()
    block = (transformer.blocks if build is wan else transformer.transformer_blocks)[0]
    takes_text = build in (hunyuan_video, mochi)

    def identity(*args, **kwargs):
        given = [*args, *kwargs.values()]
        return (given[0], given[1]) if takes_text else given[0]

    block.forward = identity
    t, y, x = CELL
    video, place = torch.randn(1, 4, 2, 6, 8), [0, 0, t, 2 * y, 2 * x]
    if build is ltx_video:  # its pipeline packs latents to tokens
        video, place = torch.randn(1, 24, 4), [0, (t * GRID[1] + y) * GRID[2] + x]
    text_BLD = torch.randn(1, 5, 16)
    tap, taken = BlockTap(block), []
    for change in (0.0, 1.0):
        changed = video.clone()
        changed[tuple(place)] += change
        with tap, torch.no_grad():
            transformer(
                hidden_states=changed,
                encoder_hidden_states=text_BLD,
                timestep=torch.tensor([5]),
                **inputs,
            )
        taken.append(tap.take().unflatten(1, GRID))
    differs_THW = (taken[0] != taken[1]).any(-1)[0]
    assert differs_THW.nonzero().tolist() == [list(CELL)]
