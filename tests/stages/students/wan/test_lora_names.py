"""Module names in LoRA files against diffusers' own converters, for every linear layer."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from torch import nn

from stages.students.wan.configs import WanConfigs

OUTSIDE_BLOCKS = ("proj_out", "condition_embedder.")


@pytest.fixture(scope="module")
def modules(wan_bases):
    transformer = WanTransformer3DModel.from_pretrained(wan_bases["i2v"] / "transformer")
    return [n for n, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def test_comfyuis_names_convert_back(modules):
    weights = {}
    for number, module in enumerate(modules):
        name = WanConfigs.lora_layer_name(module, "comfyui")
        for factor in ("lora_A", "lora_B"):
            weights[f"{name}.{factor}.weight"] = torch.full((1, 1), float(number))
    found = _convert_non_diffusers_wan_lora_to_diffusers(weights)
    assert {name: int(value) for name, value in found.items()} == {
        f"transformer.{module}.{factor}.weight": number
        for number, module in enumerate(modules)
        for factor in ("lora_A", "lora_B")
    }


def test_kohyas_names_convert_back(modules):
    """musubi-tuner trains the blocks."""
    inside = [module for module in modules if not module.startswith(OUTSIDE_BLOCKS)]
    weights = {}
    for number, module in enumerate(inside):
        name = WanConfigs.lora_layer_name(module, "kohya")
        weights[f"{name}.alpha"] = torch.tensor(1.0)
        for factor in ("lora_down", "lora_up"):
            weights[f"{name}.{factor}.weight"] = torch.full((1, 1), float(number))
    found = _convert_musubi_wan_lora_to_diffusers(weights)
    assert {name: int(value) for name, value in found.items()} == {
        f"transformer.{module}.{factor}.weight": number
        for number, module in enumerate(inside)
        for factor in ("lora_A", "lora_B")
    }
