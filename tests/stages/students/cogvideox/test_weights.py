"""Identification of base models by their weights."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from stages.students.weights import hash_transformer


def save(folder, *, dtype=torch.float32, change=None, **options):
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=1,
        sample_height=4,
        sample_width=6,
        sample_frames=9,
    ).to(dtype)
    with torch.no_grad():
        if change is not None:
            dict(transformer.named_parameters())[change].mul_(1.01)
    transformer.save_pretrained(folder / "transformer", **options)
    return hash_transformer(folder)


def test_the_same_weights_in_other_files_are_the_same_model(tmp_path):
    assert save(tmp_path / "one") == save(tmp_path / "several", max_shard_size="20KB")
    assert len(list((tmp_path / "several" / "transformer").glob("*.safetensors"))) > 2


@pytest.mark.parametrize(
    "change", ["patch_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight", "proj_out.bias"]
)
def test_one_changed_tensor_is_another_model(tmp_path, change):
    assert save(tmp_path / "base") != save(tmp_path / "tuned", change=change)


def test_another_format_is_another_model(tmp_path):
    assert save(tmp_path / "base") != save(tmp_path / "half", dtype=torch.bfloat16)


def test_missing_weights_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model"):
        hash_transformer(tmp_path)
