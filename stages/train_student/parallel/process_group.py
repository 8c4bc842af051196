"""Ranks and process group of a run, and collectives over Python objects.

`torchrun` and `deepspeed` pass the rank to each process through the environment; with plain `srun`
the command line sets the same variables. Without a launcher there is one process, whose group
initialises through a file, so no port is opened.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among all processes of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the run's files."""
        return self.rank == 0


def world_from_environment() -> World:
    """Read the launcher's variables; a single process without them.

    Raises:
        ValueError: the variables are inconsistent.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if size > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {size} but RANK is not set; start several processes with torchrun or "
            "deepspeed, one without either"
        )
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be from 0 to WORLD_SIZE - 1 = {size - 1}, got {rank}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return World(rank=rank, local_rank=local_rank, size=size, device=device)


@contextmanager
def process_group(world: World) -> Iterator[None]:
    """Context manager of the default process group: NCCL on GPUs, Gloo on CPUs."""
    backend = "gloo"
    if world.device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(world.device)
    with ExitStack() as stack:
        if world.size == 1:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sam2vx-group-"))
            method = f"file://{Path(folder) / 'store'}"
        else:
            method = "env://"
        dist.init_process_group(backend, init_method=method, rank=world.rank, world_size=world.size)
        try:
            yield
        finally:
            if dist.is_initialized():  # an engine may have destroyed it already
                dist.destroy_process_group()


def on_first_rank(world: World, action: Callable[[], T], *, timeout: timedelta | None = None) -> T:
    """Run `action` on rank 0 and broadcast its result; its error is raised on every rank.

    Args:
        timeout: how long the other ranks wait; None uses the default group's, ten minutes on GPUs.

    Raises:
        Exception: the error that `action` raised; on other ranks a RuntimeError with its message.
    """
    if world.size == 1:
        return action()
    result_and_error: list[Any] = [None, None]
    error: Exception | None = None
    with _group_with_timeout(timeout) as group:
        if world.is_first:
            try:
                result_and_error[0] = action()
            except Exception as caught:
                error, result_and_error[1] = caught, str(caught)
        dist.broadcast_object_list(result_and_error, src=0, group=group)
    if error is not None:
        raise error
    if result_and_error[1] is not None:
        raise RuntimeError(f"rank 0 failed: {result_and_error[1]}")
    return result_and_error[0]


@contextmanager
def _group_with_timeout(timeout: timedelta | None) -> Iterator[Any]:
    """A group with this timeout; None, for the default group, without one."""
    if timeout is None:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def gather(world: World, value: T, *, timeout: timedelta | None = None) -> list[T]:
    """Gather the values of all ranks, in rank order, on every rank.

    Args:
        timeout: as for `on_first_rank`.
    """
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    with _group_with_timeout(timeout) as group:
        dist.all_gather_object(values, value, group=group)
    return values


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier()
