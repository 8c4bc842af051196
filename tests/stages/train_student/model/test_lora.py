"""Adapters: what they compute, against float64; their names in files; wrong targets."""

import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

from stages.students.cogvideox.configs import CogVideoXConfigs
from stages.train_student.config import LoraSettings
from stages.train_student.model.lora import add_adapters, check_targets, exported_name

KINDS = {
    "lora": {},
    "dora": {"dora": True},
    "rslora": {"rank_stabilized": True},
    "both": {"dora": True, "rank_stabilized": True},
}


def adapted(tiny, kind, *, rank=4, alpha=2.5):
    """A transformer with adapters that do something."""
    transformer = tiny.tiny_transformer()
    add_adapters(transformer, LoraSettings(rank=rank, alpha=alpha, **KINDS[kind]))
    generator = torch.Generator().manual_seed(3)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return transformer


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_layer_computes_what_its_paper_says(tiny, kind):
    rank, alpha = 4, 2.5
    layer = adapted(tiny, kind, rank=rank, alpha=alpha).transformer_blocks[0].attn1.to_q
    x_NI = torch.randn(5, 32)
    scale = alpha / (math.sqrt(rank) if "rank_stabilized" in KINDS[kind] else rank)
    down_RI = layer.lora_A["default"].weight.double()
    up_OR = layer.lora_B["default"].weight.double()
    weight_OI = layer.base_layer.weight.double() + scale * up_OR @ down_RI
    if "dora" in KINDS[kind]:
        length_O = layer.lora_magnitude_vector["default"].weight.double()
        weight_OI = length_O[:, None] * weight_OI / weight_OI.norm(dim=1, keepdim=True)
    expected_NO = x_NI.double() @ weight_OI.T + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x_NI).double(), expected_NO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_without_effect_and_are_all_that_is_trained(tiny, kind):
    transformer = tiny.tiny_transformer()
    layer = transformer.transformer_blocks[1].attn1.to_v
    x_NI = torch.randn(5, 32)
    before = layer(x_NI)
    add_adapters(transformer, LoraSettings(rank=2, **KINDS[kind]))
    after = transformer.transformer_blocks[1].attn1.to_v(x_NI)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * 4 * (3 if "dora" in KINDS[kind] else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_names_are_those_of_peft(tiny, kind):
    transformer = adapted(tiny, kind)
    named = {exported_name(n) for n, p in transformer.named_parameters() if p.requires_grad}
    assert named == set(get_peft_model_state_dict(transformer))


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("to_w", r"no module 'to_w'; did you mean .*to_q"),
        ("attn.to_q", r"did you mean attn1\.to_q"),
        ("zzz", r"no module 'zzz'; to_q, to_k, to_v, to_out\.0 are usual"),
        ("proj", r"also names patch_embed\.proj, which is a Conv2d"),
        ("to_out", r"also names .*attn1\.to_out, which is a ModuleList"),
    ],
)
def test_wrong_targets_are_refused_with_near_names(tiny, target, told):
    transformer = dict(tiny.tiny_transformer().config)
    configs = CogVideoXConfigs(folder=Path(), transformer=transformer, vae={}, scheduler={})
    with pytest.raises(ValueError, match=told):
        check_targets(LoraSettings(target_modules=("to_q", target)), configs)
    check_targets(LoraSettings(), configs)


def test_wrong_targets_are_refused_before_any_weight_is_loaded(train, monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("stages.train_student.model.loading.load_transformer", never)
    with pytest.raises(ValueError, match="no module 'to_w'"):
        train(tmp_path / "run", lora={"target_modules": ["to_w"]})
    assert not (tmp_path / "run").exists()
