"""Full weights: read one at a time from a checkpoint's files, and written in diffusers formats.

Reading needs neither an engine nor DeepSpeed: files are memory-mapped, and only the requested
weight is read. With ZeRO 0 to 2, rank 0's file holds the weights as trained. With ZeRO 3 they are
only in the optimizer files of all ranks: flat float32 groups, in which every parameter takes the
same number of elements on every rank, padded on the last.

Writing takes names, shapes and a function that reads one weight. With ZeRO 3 reading a weight is a
collective gather, so all ranks read the same names in the same order; rank 0 writes.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from torch import Tensor

from stages.files.tensor_files import save_tensors
from stages.sample_videos.runs import LoraFormat
from stages.students.registry import student_of_transformer
from stages.train_student.checkpoints.lora_formats import write_adapters
from stages.train_student.checkpoints.records import Checkpoint
from stages.train_student.model.lora import exported_name
from stages.train_student.parallel.deepspeed import refuse_unsafe_pickles
from stages.train_student.parallel.process_group import World, on_first_rank

_WHOLE = "mp_rank_00_model_states.pt"
_PARTITIONED = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"


class CheckpointWeights:
    """The trained weights in a complete checkpoint, by parameter name of the student."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, *, weights_needed: bool = True
    ) -> None:
        """Open the files.

        Args:
            checkpoint: a complete checkpoint.
            dtype: dtype of the weights in training.
            weights_needed: if False, `read` may only be used for buffers (with ZeRO 3).

        Raises:
            ValueError: the files do not hold the weights.
        """
        self._folder = checkpoint.folder
        self._dtype = dtype
        partitioned = checkpoint.zero_stage == 3
        state = _load(self._folder / (_PARTITIONED if partitioned else _WHOLE))
        self._whole: dict[str, Tensor] = state["module"]
        self._layout: dict[str, _Partition] = {}
        self._ranks: list[list[Tensor]] = []
        if partitioned:
            shapes = dict(itertools.chain.from_iterable(s.items() for s in state["param_shapes"]))
            self._compute_offsets(shapes, checkpoint.world_size)
            if weights_needed:
                self._open_partitions(checkpoint)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all full weights, by name."""
        return {
            name: self._layout[name].shape if name in self._layout else tuple(stored.shape)
            for name, stored in self._whole.items()
        }

    def read(self, name: str) -> Tensor:
        """Read a full weight, in its dtype in training."""
        if name not in self._layout:
            return self._whole[name].clone()
        partition = self._layout[name]
        numel = math.prod(partition.shape)
        flat = torch.empty(numel, dtype=self._dtype)
        for rank, groups in enumerate(self._ranks):
            start = min(rank * partition.per_rank, numel)
            stop = min(start + partition.per_rank, numel)
            if start < stop:
                flat[start:stop] = _slice(groups, partition.offset, stop - start)
        return flat.view(partition.shape)

    def _compute_offsets(self, shapes: dict[str, torch.Size], world_size: int) -> None:
        offset = 0
        for name, shape in shapes.items():
            per_rank = math.ceil(shape.numel() / world_size)
            self._layout[name] = _Partition(shape=tuple(shape), offset=offset, per_rank=per_rank)
            offset += per_rank

    def _open_partitions(self, checkpoint: Checkpoint) -> None:
        expected = sum(partition.per_rank for partition in self._layout.values())
        for rank in range(checkpoint.world_size):
            paths = list(self._folder.glob(_OPTIMIZER.format(rank)))
            if len(paths) != 1:
                raise ValueError(
                    f"{self._folder} has {len(paths)} optimizer files of rank {rank}, expected 1; "
                    "use another checkpoint"
                )
            groups = _load(paths[0])["optimizer_state_dict"]["fp32_flat_groups"]
            held = sum(group.numel() for group in groups)
            if held != expected:
                raise ValueError(
                    f"{self._folder} holds {held} of rank {rank}'s {expected} weights; weights "
                    "offloaded to NVMe are not saved in checkpoints: let the run finish, which "
                    "exports them"
                )
            self._ranks.append(groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Partition:
    """Location of a ZeRO 3 parameter in each rank's concatenated groups."""

    shape: tuple[int, ...]
    offset: int
    per_rank: int


def _slice(groups: Iterable[Tensor], start: int, numel: int) -> Tensor:
    """Elements `start` to `start + numel` of the concatenated groups."""
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
    """Placeholder for other objects in DeepSpeed's files; none of their code is executed."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing; use another checkpoint")
    # torch accepts (class, name) to load the class in place of the global `name`.
    placeholders: list[Any] = [
        (_Ignored, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    ]
    with refuse_unsafe_pickles(), torch.serialization.safe_globals(placeholders):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


TRANSFORMER = "transformer."
"""Prefix of the transformer's weights in the student."""

HEADS = "heads."
"""Prefix of the heads' weights in the student."""

LARGEST_FILE = "5GB"
"""Largest file of an exported transformer; rank 0 holds one file in memory at a time."""

_FILE_NAMES = "diffusion_pytorch_model{suffix}.safetensors"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights by parameter name of the student, read one at a time."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[str], Tensor | None]
    """Returns the full weight on the CPU; may return None on other ranks than 0."""

    def names_under(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`."""
        return [name for name in self.shapes if name.startswith(prefix)]

    def read_all(self, prefix: str, world: World) -> dict[str, Tensor]:
        """All weights under `prefix`, by name without it; empty on other ranks than 0."""
        return _read_renamed(
            {name: name.removeprefix(prefix) for name in self.names_under(prefix)}, self, world
        )


def write_lora(
    weights: Weights,
    settings: LoraConfig,
    transformer_name: str,
    folder: Path,
    world: World,
    form: LoraFormat,
) -> None:
    """Write LoRA adapters in a key format; every rank must call this.

    Args:
        weights: the student's weights.
        settings: settings of the adapters.
        transformer_name: class of the transformer.
        folder: receives the file.
        world: rank and world size.
        form: the key format.
    """
    student = student_of_transformer(transformer_name)
    names = [name for name in weights.names_under(TRANSFORMER) if ".lora_" in name]
    new_names = {name: exported_name(name.removeprefix(TRANSFORMER)) for name in names}
    layers = _read_renamed(new_names, weights, world)
    on_first_rank(world, lambda: write_adapters(layers, settings, student, folder, form))


def write_transformer(
    weights: Weights,
    settings: Mapping[str, Any],
    transformer_name: str,
    folder: Path,
    world: World,
) -> None:
    """Write a full transformer for `from_pretrained`, file by file; every rank must call this.

    Args:
        weights: the student's weights, including all of the transformer.
        settings: the transformer's configuration.
        transformer_name: its class.
        folder: created here.
        world: rank and world size.

    Raises:
        ValueError: weights are missing or unexpected, or differ in shape from the configuration.
    """
    model_class = student_of_transformer(transformer_name).model_class("transformer")
    with torch.device("meta"):
        empty = model_class.from_config(dict(settings))
    expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    _check_shapes(weights, expected)
    empty_weights = {
        name: torch.empty(shape, dtype=weights.dtype, device="meta")
        for name, shape in expected.items()
    }
    plan = split_torch_state_dict_into_shards(
        empty_weights, filename_pattern=_FILE_NAMES, max_shard_size=LARGEST_FILE
    )
    on_first_rank(world, lambda: empty.save_config(str(folder)))
    for file, names in plan.filename_to_tensors.items():
        _write_file(weights, names, folder / file, world)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        on_first_rank(world, lambda: (folder / _INDEX).write_text(text, encoding="utf-8"))


def _write_file(weights: Weights, names: list[str], path: Path, world: World) -> None:
    tensors = _read_renamed({TRANSFORMER + name: name for name in names}, weights, world)
    on_first_rank(world, lambda: save_tensors(tensors, path, {"format": "pt"}))


def _check_shapes(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {
        name.removeprefix(TRANSFORMER): weights.shapes[name]
        for name in weights.names_under(TRANSFORMER)
    }
    wrong = [name for name in found.keys() | expected if found.get(name) != expected.get(name)]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{len(wrong)} weights do not match the transformer's configuration, such as {name}: "
            f"shape {found.get(name, 'missing')}, expected {expected.get(name, 'none')}; the run "
            "was trained from another base model, or its files are damaged"
        )


def _read_renamed(
    new_names: Mapping[str, str], weights: Weights, world: World
) -> dict[str, Tensor]:
    """Read weights on every rank; rank 0 returns them under new names, other ranks nothing."""
    renamed = {}
    for name, new in new_names.items():
        value = weights.read(name)
        if world.is_first:
            assert value is not None, f"rank 0 got no {name}"
            renamed[new] = value.contiguous()
    return renamed
