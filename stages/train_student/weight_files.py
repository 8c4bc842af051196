"""Writes weights as diffusers reads them: adapters with their strength, or a whole transformer.

`export` hands it names, shapes and a way to read one weight. With ZeRO 3 every rank must read, as
that is what gathers a weight, so all ranks walk through the same names; rank 0 writes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from torch import Tensor

from stages.safetensors_io import save_tensors
from stages.sample_videos.runs import LoraFormat
from stages.train_student.distributed import World, on_first_rank
from stages.train_student.lora import exported_name
from stages.train_student.lora_formats import write_adapters

TRANSFORMER = "transformer."
"""What the names of the transformer's weights begin with in the student."""

HEADS = "heads."
"""What the names of the heads' weights begin with."""

LARGEST_FILE = "5GB"
"""A whole transformer is written in files of up to this size; rank 0 holds one at a time."""

_FILE_NAMES = "diffusion_pytorch_model{suffix}.safetensors"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights by their names in the student, read one at a time."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[str], Tensor | None]
    """The whole weight on the CPU; None where rank 0 alone gets it."""

    def within(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`."""
        return [name for name in self.shapes if name.startswith(prefix)]

    def read_all(self, prefix: str, world: World) -> dict[str, Tensor]:
        """On rank 0 all weights that begin with `prefix`, by the rest of their names."""
        return _kept({name: name.removeprefix(prefix) for name in self.within(prefix)}, self, world)


def write_lora(
    weights: Weights, settings: LoraConfig, folder: Path, world: World, form: LoraFormat
) -> None:
    """Write adapters in a key form; every rank must call this."""
    names = [name for name in weights.within(TRANSFORMER) if ".lora_" in name]
    new_names = {name: exported_name(name.removeprefix(TRANSFORMER)) for name in names}
    layers = _kept(new_names, weights, world)
    on_first_rank(world, lambda: write_adapters(layers, settings, folder, form))


def write_transformer(
    weights: Weights, settings: Mapping[str, Any], folder: Path, world: World
) -> None:
    """Write a whole transformer for `from_pretrained`, file by file; every rank must call this.

    Args:
        weights: of the student, all of the transformer's among them.
        settings: the transformer's configuration.
        folder: made here.
        world: this process among all.

    Raises:
        ValueError: weights are missing, too many, or of other shapes than the configuration says.
    """
    with torch.device("meta"):
        empty = CogVideoXTransformer3DModel.from_config(dict(settings))
    expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    _refuse_other_weights(weights, expected)
    blanks = {
        name: torch.empty(shape, dtype=weights.dtype, device="meta")
        for name, shape in expected.items()
    }
    plan = split_torch_state_dict_into_shards(
        blanks, filename_pattern=_FILE_NAMES, max_shard_size=LARGEST_FILE
    )
    on_first_rank(world, lambda: empty.save_config(str(folder)))
    for file, names in plan.filename_to_tensors.items():
        _write_file(weights, names, folder / file, world)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        on_first_rank(world, lambda: (folder / _INDEX).write_text(text, encoding="utf-8"))


def _write_file(weights: Weights, names: list[str], path: Path, world: World) -> None:
    part = _kept({TRANSFORMER + name: name for name in names}, weights, world)
    on_first_rank(world, lambda: save_tensors(part, path, {"format": "pt"}))


def _refuse_other_weights(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {
        name.removeprefix(TRANSFORMER): weights.shapes[name] for name in weights.within(TRANSFORMER)
    }
    wrong = [name for name in found.keys() | expected if found.get(name) != expected.get(name)]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{len(wrong)} weights do not fit the transformer's configuration, such as {name}: "
            f"{found.get(name, 'missing')} where it says {expected.get(name, 'none')}; the run was "
            "trained from another base model, or its files are damaged"
        )


def _kept(new_names: Mapping[str, str], weights: Weights, world: World) -> dict[str, Tensor]:
    """Read weights on every rank, keep them on rank 0, under new names."""
    kept = {}
    for name, new in new_names.items():
        value = weights.read(name)
        if world.is_first:
            assert value is not None, f"rank 0 got no {name}"
            kept[new] = value.contiguous()
    return kept
