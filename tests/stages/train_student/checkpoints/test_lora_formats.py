"""Exported adapters in other programs: the output changes by as much as in training."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from stages.sample_videos.runs import LORA_FILES, find_export
from stages.students.cogvideox.configs import CogVideoXConfigs
from stages.train_student.checkpoints.lora_formats import write_adapters
from stages.train_student.config import LoraSettings
from stages.train_student.model.lora import add_adapters, lora_config

KINDS = {
    "lora": {},
    "rslora": {"rank_stabilized": True},
    "dora": {"dora": True},
    "both": {"dora": True, "rank_stabilized": True},
}
RANK, ALPHA = 8, 2.0
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear", "linear_1")
SCRIPT = Path(__file__).with_name("adapters_in_diffusers.py")


def inputs(tiny):
    generator = torch.Generator().manual_seed(1)
    frames, channels, height, width = tiny.LATENT
    tokens = frames * height * width // 4
    return {
        "hidden_states": torch.randn(1, frames, channels, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(1, *tiny.TEXT, generator=generator),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (torch.ones(tokens, 16), torch.zeros(tokens, 16)),
        "return_dict": False,
    }


@torch.no_grad()
def change(tiny, transformer):
    """What a transformer's output differs by from the base's."""
    return transformer(**inputs(tiny))[0] - tiny.tiny_transformer()(**inputs(tiny))[0]


@pytest.fixture
def written(tiny, tmp_path):
    """Write adapters: written(kind, form) -> the change they make in the memory of training."""

    def write(kind, form="diffusers", **settings):
        settings = {"rank": RANK, "alpha": ALPHA, "target_modules": TARGETS} | settings
        adapters = LoraSettings(**settings, **KINDS[kind])
        transformer = tiny.tiny_transformer()
        add_adapters(transformer, adapters)
        generator = torch.Generator().manual_seed(3)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        layers = get_peft_model_state_dict(transformer)
        write_adapters(layers, lora_config(adapters), CogVideoXConfigs, tmp_path, form)
        return change(tiny, transformer)

    return write


def close(found, expected):
    assert expected.abs().max() > 0.01, "the adapters do something"
    # Folding the scale moves one rounding of fp32 from the activations to the weights.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_applies_them_as_strongly_as_training(tiny, written, tmp_path, kind):
    expected = written(kind)
    pipeline = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=tiny.tiny_transformer(),
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipeline.load_lora_weights(tmp_path)
    close(change(tiny, pipeline.transformer), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_in_the_weights_and_the_metadata_is_old(written, tiny, tmp_path, kind):
    written(kind, alpha=2.5)
    with safe_open(tmp_path / LORA_FILES["diffusers"], "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    known = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    known |= {"use_dora"} if "dora" in KINDS[kind] else set()
    assert about.keys() == {f"transformer.{name}" for name in known}
    assert about["transformer.r"] == about["transformer.lora_alpha"] == RANK
    assert find_export(tmp_path).lora_shapes


def merged(tiny, updates):
    """The change that weights added to the base's make."""
    transformer = tiny.tiny_transformer()
    for module, update_OI in updates.items():
        transformer.get_submodule(module).weight.data += update_OI
    return change(tiny, transformer)


def in_comfyui():
    """ComfyUI's names of the tiny transformer's adapted layers, as its model code has them."""
    for block in range(2):
        ours, theirs = f"transformer_blocks.{block}", f"diffusion_model.blocks.{block}"
        yield f"{ours}.attn1.to_q", f"{theirs}.q"
        yield f"{ours}.attn1.to_k", f"{theirs}.k"
        yield f"{ours}.attn1.to_v", f"{theirs}.v"
        yield f"{ours}.attn1.to_out.0", f"{theirs}.attn_out"
        yield f"{ours}.ff.net.0.proj", f"{theirs}.ff_proj"
        yield f"{ours}.ff.net.2", f"{theirs}.ff_out"
        yield f"{ours}.norm1.linear", f"{theirs}.norm1.linear"
    yield "time_embedding.linear_1", "diffusion_model.time_embedding_linear_1"


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_comfyui_finds_every_key(written, tiny, tmp_path, kind):
    """A file without alpha is applied by ComfyUI as lora_B @ lora_A."""
    expected = written(kind, "comfyui")
    file = load_file(tmp_path / LORA_FILES["comfyui"])
    names = dict(in_comfyui())
    updates = {
        ours: file.pop(f"{theirs}.lora_B.weight") @ file.pop(f"{theirs}.lora_A.weight")
        for ours, theirs in names.items()
    }
    assert not file, "no key is left that ComfyUI would pass over"
    close(merged(tiny, updates), expected)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_kohya_names_lead_to_the_layers(written, tiny, tmp_path, kind):
    """Underscores stand for dots: every linear layer's path, written so, is looked for."""
    expected = written(kind, "kohya")
    file = load_file(tmp_path / LORA_FILES["kohya"])
    updates = {}
    for module, layer in tiny.tiny_transformer().named_modules():
        name = "lora_unet__" + "_".join(module.split("."))
        if isinstance(layer, nn.Linear) and f"{name}.lora_up.weight" in file:
            up_OR, down_RI = (file.pop(f"{name}.lora_{side}.weight") for side in ("up", "down"))
            updates[module] = file.pop(f"{name}.alpha").item() / up_OR.shape[1] * up_OR @ down_RI
    assert not file
    close(merged(tiny, updates), expected)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_other_forms_hold_no_magnitudes(written, form):
    with pytest.raises(ValueError, match=f"DoRA .* diffusers alone; leave out --format {form}"):
        written("dora", form)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_sampling_from_another_form_says_how_to_export(written, tmp_path, form):
    written("lora", form)
    with pytest.raises(ValueError, match=rf"the {form} format.* without --format"):
        find_export(tmp_path)


@pytest.mark.parametrize("form", LORA_FILES)
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(written, tmp_path, form, umask, mode):
    before = os.umask(umask)
    try:
        written("lora", form)
    finally:
        os.umask(before)
    assert (tmp_path / LORA_FILES[form]).stat().st_mode & 0o777 == mode
    assert [file.name for file in tmp_path.iterdir()] == [LORA_FILES[form]]


def test_bf16_weights_are_scaled_before_they_are_rounded(tmp_path):
    """One rounding of bf16, of 8 bits, whatever the scale."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        f"transformer_blocks.0.attn1.to_q.lora_{side}.weight": torch.randn(
            shape, generator=generator
        ).bfloat16()
        for side, shape in (("A", (3, 32)), ("B", (32, 3)))
    }
    settings = lora_config(LoraSettings(rank=3, alpha=1.0, rank_stabilized=True))
    write_adapters(layers, settings, CogVideoXConfigs, tmp_path, "comfyui")
    file = load_file(tmp_path / LORA_FILES["comfyui"])
    exact = layers["transformer_blocks.0.attn1.to_q.lora_B.weight"].double() / math.sqrt(3)
    found = file["diffusion_model.blocks.0.q.lora_B.weight"]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-8, atol=0)


OLD = {
    "0.33": ("diffusers==0.33.1", "peft==0.15.2", "transformers==4.51.3", "tokenizers==0.21.4"),
    "0.34": ("diffusers==0.34.0", "peft==0.16.0", "transformers==4.53.3", "tokenizers==0.21.4"),
    "0.35": ("diffusers==0.35.2", "peft==0.17.1", "transformers==4.57.1", "tokenizers==0.22.1"),
    "installed": (),
}
"""What is put in front of the installed packages, torch and numpy among them."""


@pytest.fixture(scope="module", params=OLD)
def old_packages(request, tmp_path_factory):
    """A folder for PYTHONPATH that holds one generation of packages."""
    folder = tmp_path_factory.mktemp("packages")
    if OLD[request.param]:
        packages = [*OLD[request.param], "huggingface-hub==0.36.0"]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        subprocess.run([*install, "--target", str(folder), *packages], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("kind", KINDS)
def test_older_diffusers_apply_them_as_strongly(tiny, written, old_packages, tmp_path, kind):
    """They pass over the metadata, or refuse a file whose metadata names what they do not know."""
    expected = written(kind)
    tiny.tiny_transformer().save_pretrained(tmp_path / "transformer")
    torch.save(inputs(tiny), tmp_path / "inputs.pt")
    paths = [str(old_packages)] if any(old_packages.iterdir()) else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    close(torch.load(tmp_path / "change.pt"), expected)
