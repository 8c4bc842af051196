"""Whole weights: read from a checkpoint's files one at a time, and written in diffusers' formats.

Reading needs no engine and no DeepSpeed: files are memory-mapped, and only the requested weight is
read. With ZeRO 0 to 2, rank 0's file holds the weights as trained. With ZeRO 3 they are only in
each rank's optimizer file: flat float32 groups, in which every parameter takes the same number of
elements on every rank, the last one padded.

Writing takes names, shapes and a function that reads one weight. With ZeRO 3 every rank must read,
since that gathers a weight, so all ranks go through the same names; rank 0 writes.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from torch import Tensor

from stages.files.safetensors import save_tensors
from stages.sample_videos.runs import LoraFormat
from stages.train_student.checkpoints.lora_formats import write_adapters
from stages.train_student.checkpoints.records import Checkpoint
from stages.train_student.checkpoints.unpickling import code_refused
from stages.train_student.model.lora import exported_name
from stages.train_student.parallel.process_group import World, on_first_rank

_WHOLE = "mp_rank_00_model_states.pt"
_PARTITIONED = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"


class CheckpointWeights:
    """The trained weights in a complete checkpoint, by their names in the student."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, *, weights_needed: bool = True
    ) -> None:
        """Open the files.

        Args:
            checkpoint: a complete one.
            dtype: format in which the weights were trained.
            weights_needed: without, `read` has the buffers alone where ZeRO 3 wrote the files.

        Raises:
            ValueError: the files do not hold the weights.
        """
        self._folder = checkpoint.folder
        self._dtype = dtype
        partitioned = checkpoint.zero_stage == 3
        state = _load(self._folder / (_PARTITIONED if partitioned else _WHOLE))
        self._whole: dict[str, Tensor] = state["module"]
        self._parts: dict[str, _Parts] = {}
        self._ranks: list[list[Tensor]] = []
        if partitioned:
            shapes = dict(itertools.chain.from_iterable(s.items() for s in state["param_shapes"]))
            self._place(shapes, checkpoint.world_size)
            if weights_needed:
                self._open_partitions(checkpoint)

    @property
    def names(self) -> list[str]:
        """Of all weights that the checkpoint holds."""
        return list(self._whole)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, when whole."""
        return self._parts[name].shape if name in self._parts else tuple(self._whole[name].shape)

    def read(self, name: str) -> Tensor:
        """A whole weight, in the format in which it was trained."""
        if name not in self._parts:
            return self._whole[name].clone()
        parts = self._parts[name]
        numel = math.prod(parts.shape)
        flat = torch.empty(numel, dtype=self._dtype)
        for rank, groups in enumerate(self._ranks):
            start = min(rank * parts.per_rank, numel)
            stop = min(start + parts.per_rank, numel)
            if start < stop:
                flat[start:stop] = _slice(groups, parts.offset, stop - start)
        return flat.view(parts.shape)

    def _place(self, shapes: dict[str, torch.Size], world_size: int) -> None:
        offset = 0
        for name, shape in shapes.items():
            per_rank = math.ceil(shape.numel() / world_size)
            self._parts[name] = _Parts(shape=tuple(shape), offset=offset, per_rank=per_rank)
            offset += per_rank

    def _open_partitions(self, checkpoint: Checkpoint) -> None:
        expected = sum(parts.per_rank for parts in self._parts.values())
        for rank in range(checkpoint.world_size):
            paths = list(self._folder.glob(_OPTIMIZER.format(rank)))
            if len(paths) != 1:
                raise ValueError(
                    f"{self._folder} has {len(paths)} optimizer files of rank {rank}, not one; use "
                    "another checkpoint"
                )
            groups = _load(paths[0])["optimizer_state_dict"]["fp32_flat_groups"]
            held = sum(group.numel() for group in groups)
            if held != expected:
                raise ValueError(
                    f"{self._folder} holds {held} of rank {rank}'s {expected} weights; those that "
                    "were offloaded to nvme are in no checkpoint: let the run finish, which "
                    "exports them"
                )
            self._ranks.append(groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """Where a partitioned parameter lies in each rank's groups laid end to end."""

    shape: tuple[int, ...]
    offset: int
    per_rank: int


def _slice(groups: Iterable[Tensor], start: int, numel: int) -> Tensor:
    """`numel` elements from `start` of the groups laid end to end."""
    pieces = []
    for group in groups:
        size = group.numel()
        low, high = max(start, 0), min(start + numel, size)
        if low < high:
            pieces.append(group[low:high])
        start -= size
        if start + numel <= 0:
            break
    return torch.cat(pieces)


class _Ignored:
    """Stands in for what DeepSpeed's files hold beside tensors; no code of it is run."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing; use another checkpoint")
    # (class, name) is how torch takes a stand-in for what a file calls `name`.
    stand_ins: list[Any] = [
        (_Ignored, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    ]
    with code_refused(), torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


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
