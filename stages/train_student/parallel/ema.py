"""Exponential moving average (EMA) of the trained weights, in float32, sharded over the ranks.

Each rank averages only the weights that it updates itself: with ZeRO 1 to 3 its shard of
DeepSpeed's float32 weights, so that nothing is gathered; without ZeRO a subset of the parameters.
Checkpoints store the average as

    checkpoint-500/weight_average_rank_00000.safetensors    one file per rank

with flat pieces `<parameter>@<first element>`, which any number of ranks can read.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cache_schema.checksummed_json import parse_json
from stages.files.tensor_files import save_tensors
from stages.train_student.config import TrainConfig
from stages.train_student.parallel.process_group import World

_FILE = "weight_average_rank_{:05d}.safetensors"
_METADATA_KEY = "weight_average"


def check_average(config: TrainConfig) -> None:
    """Reject an EMA that would be too slow to update, before anything is loaded.

    Raises:
        ValueError: the float32 weights are offloaded to NVMe.
    """
    if config.ema.decay is not None and config.deepspeed.offload_optimizer == "nvme":
        raise ValueError(
            "train.ema.decay needs the float32 weights at every step, but "
            "train.deepspeed.offload_optimizer=nvme keeps them on a disk; set it to cpu or none"
        )


def effective_decay(decay: float, updates: int) -> float:
    """Decay of the update after n = `updates` updates: min(decay, (1 + n) / (10 + n)).

    The warm-up keeps the initial weights from dominating the average of a short run.
    """
    return min(decay, (1 + updates) / (10 + updates))


@dataclass(kw_only=True, slots=True)
class _Piece:
    """This rank's part of one parameter: elements start to stop of the flattened parameter."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"

    def current(self) -> Tensor:
        """The current weights, flat; float32 if DeepSpeed keeps a float32 copy."""
        parameter: Any = self.parameter
        if hasattr(parameter, "ds_id"):
            local = parameter._z3_optimizer.get_local_fp32_param(parameter)
            return local.detach()[: self.stop - self.start]
        if getattr(parameter, "_hp_mapping", None) is not None:
            return parameter._hp_mapping.get_hp_fragment().detach()
        return parameter.detach().flatten()[self.start : self.stop]


class WeightAverage:
    """This rank's part of the exponential moving average of a student's trained weights."""

    def __init__(self, student: nn.Module, decay: float, world: World) -> None:
        """Start from the current weights.

        Args:
            student: already wrapped by its DeepSpeed engine, which determines each rank's part.
            decay: decay after the warm-up.
            world: this process among all.
        """
        self.decay = decay
        self.updates = 0
        self._world = world
        self._pieces = _local_pieces(student, world)
        self._averages = [piece.current().float().clone() for piece in self._pieces]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        weight = 1.0 - effective_decay(self.decay, self.updates)
        for piece, average in zip(self._pieces, self._averages, strict=True):
            average.lerp_(piece.current().to(average), weight)
        self.updates += 1

    def save(self, folder: Path) -> None:
        """Write this rank's part into `folder`; every rank must call this."""
        info = {"updates": self.updates, "decay": self.decay, "world_size": self._world.size}
        tensors = {
            piece.key: average.cpu()
            for piece, average in zip(self._pieces, self._averages, strict=True)
        }
        metadata = {"format": "pt", _METADATA_KEY: json.dumps(info)}
        save_tensors(tensors, folder / _FILE.format(self._world.rank), metadata)

    def load(self, folder: Path, world_size_of_checkpoint: int) -> None:
        """Load from a checkpoint of `world_size_of_checkpoint` ranks.

        Raises:
            ValueError: a file is missing, damaged, or of other weights.
        """
        with SavedAverage(folder, world_size_of_checkpoint) as saved:
            for piece, average in zip(self._pieces, self._averages, strict=True):
                average.copy_(saved.read(piece.name, piece.start, piece.stop))
            self.updates = saved.updates


class SavedAverage:
    """Reader of a checkpoint's average, written by any number of ranks; a context manager."""

    def __init__(self, folder: Path, world_size: int) -> None:
        """Set the file names; files are opened on entering the context.

        Args:
            folder: folder of the checkpoint.
            world_size: number of ranks that wrote it.
        """
        self.updates = 0
        self.decay = 0.0
        self._folder = folder
        self._files = [folder / _FILE.format(rank) for rank in range(world_size)]
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)

    def __enter__(self) -> "SavedAverage":
        """Open the files and index their pieces.

        Raises:
            ValueError: a file is missing or damaged.
        """
        for path in self._files:
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing: this checkpoint keeps no average of the weights; use the "
                    "last weights (--weights last), or another checkpoint"
                )
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); use another checkpoint") from error
            try:
                self._index_pieces(file)
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise ValueError(
                    f"{path} is not a file of averaged weights ({error!r}); use another checkpoint"
                ) from error
        return self

    def _index_pieces(self, file: Any) -> None:
        info = parse_json(file.metadata()[_METADATA_KEY])
        self.updates, self.decay = int(info["updates"]), float(info["decay"])
        for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
            named = re.fullmatch(r"(.*)@(\d{1,18})", key)
            if named is None:
                raise ValueError(f"{key!r:.80} is not <parameter>@<first element>")
            name, start = named[1], int(named[2])
            (numel,) = file.get_slice(key).get_shape()
            self._pieces[name].append((start, start + numel, file, key))

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements start to stop of a flattened parameter, in float32.

        Raises:
            ValueError: the files do not hold all of them.
        """
        values = torch.empty(stop - start)
        found = 0
        for first, last, file, key in self._pieces.get(name, ()):
            low, high = max(first, start), min(last, stop)
            if low < high:
                values[low - start : high - start] = file.get_slice(key)[low - first : high - first]
                found += high - low
        if found != stop - start:
            raise ValueError(
                f"the average in {self._folder} holds {found} of the elements {start} to {stop} of "
                f"{name}; it belongs to another model, or is damaged: use another checkpoint"
            )
        return values


def _local_pieces(student: nn.Module, world: World) -> list[_Piece]:
    """This rank's pieces of the trained parameters; each element belongs to exactly one rank."""
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    if any(hasattr(p, "ds_id") for _, p in trained):
        return [piece for name, p in trained if (piece := _zero3_piece(name, p, world)) is not None]
    if any(hasattr(p, "_hp_mapping") for _, p in trained):
        return [piece for name, p in trained if (piece := _zero12_piece(name, p)) is not None]
    return [
        _Piece(name=name, parameter=p, start=0, stop=p.numel())
        for name, p in _assigned_parameters(trained, world)
    ]


def _zero3_piece(name: str, parameter: Any, world: World) -> _Piece | None:
    """ZeRO 3: ranks have partitions of equal size, the last ones padded."""
    size = parameter.partition_numel()
    start = min(world.rank * size, parameter.ds_numel)
    stop = min(start + size, parameter.ds_numel)
    if start == stop:
        return None
    return _Piece(name=name, parameter=parameter, start=start, stop=stop)


def _zero12_piece(name: str, parameter: Any) -> _Piece | None:
    """ZeRO 1 and 2: the rank's fragment of the parameter in the flat buffer of all weights."""
    if parameter._hp_mapping is None:
        return None
    address = parameter._hp_mapping.lp_fragment_address
    stop = address.start + address.numel
    return _Piece(name=name, parameter=parameter, start=address.start, stop=stop)


def _assigned_parameters(
    trained: Iterable[tuple[str, nn.Parameter]], world: World
) -> list[tuple[str, nn.Parameter]]:
    """Without ZeRO: whole parameters, largest first, each to the rank with the smallest load."""
    loads = [0] * world.size
    mine = []
    for name, parameter in sorted(trained, key=lambda item: (-item[1].numel(), item[0])):
        rank = loads.index(min(loads))
        loads[rank] += parameter.numel()
        if rank == world.rank:
            mine.append((name, parameter))
    return mine
