"""Tokens of a transformer that is loaded block by block, against diffusers' whole model."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from stages.probe_blocks.blockwise import BlockwiseTransformer
from stages.students.registry import read_configs
from stages.train_student.step import StudentInputs
from tests.stages.train_student.conftest import LATENT, TEXT, save_pipeline, tiny_transformer

CPU = torch.device("cpu")
MODELS = {
    "text-to-video, rotary": {},
    "sines and cosines, as 2B": {"use_rotary_positional_embeddings": False},
    "image-to-video, learned positions": {
        "in_channels": 2 * LATENT[1],
        "use_learned_positional_embeddings": True,
    },
    "image-to-video 1.5": {
        "in_channels": 2 * LATENT[1],
        "patch_size_t": 2,
        "patch_bias": False,
        "ofs_embed_dim": 16,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_tokens_are_those_of_the_whole_model(tmp_path, changes, dtype):
    base = save_pipeline(tmp_path, transformer=tiny_transformer(**changes))
    configs = read_configs(base)
    torch.manual_seed(1)
    frames = LATENT[0] + configs.padding(LATENT[0])
    channels = changes.get("in_channels", LATENT[1])
    of_clips = configs.transformer_inputs(
        torch.randn(1, frames, channels, *LATENT[2:]).to(dtype),
        torch.randn(1, *TEXT).to(dtype),
        torch.tensor([700]),
    )
    inputs = StudentInputs(
        transformer=configs.shape_inputs(frames, *LATENT[2:], CPU) | of_clips,
        token_grid=configs.token_grid(LATENT[0], *LATENT[2:]),
        time_weights={},
    )

    whole = CogVideoXTransformer3DModel.from_pretrained(base / "transformer", torch_dtype=dtype)
    expected = []
    for block in whole.eval().transformer_blocks:
        block.register_forward_hook(lambda module, given, output: expected.append(output))
    with torch.no_grad():
        whole(**inputs.transformer)

    blockwise = BlockwiseTransformer(base, dtype, CPU)
    state = blockwise.embed(inputs)
    for number, (tokens_BND, text_BLD) in enumerate(expected):
        with blockwise.block(number) as block:
            blockwise.advance(block, state)
        assert torch.equal(state.tokens_BND, tokens_BND)
        assert torch.equal(state.text_BLD, text_BLD)


def test_weights_of_one_block_are_in_memory(base_model):
    blockwise = BlockwiseTransformer(base_model, torch.float32, CPU)

    def loaded():
        return [
            number
            for number, block in enumerate(blockwise._blocks)
            if any(parameter.device.type != "meta" for parameter in block.parameters())
        ]

    assert loaded() == []
    with blockwise.block(1):
        assert loaded() == [1]
    assert loaded() == []
