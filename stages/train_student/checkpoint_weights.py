"""Whole weights out of a checkpoint's files, one at a time; `export` uses it.

No engine and no DeepSpeed is needed: its files are opened as memory maps, so that only the weight
that is asked for is read. Without ZeRO and with ZeRO 1 and 2 rank 0's file holds the weights as
they were trained with. ZeRO 3 leaves them in each rank's optimizer file alone: flat float32 groups,
in which every parameter takes the same number of elements on every rank, the last one padded.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.train_student.checkpoints.records import Checkpoint
from stages.train_student.checkpoints.unpickling import code_refused

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
