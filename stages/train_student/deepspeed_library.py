"""DeepSpeed as a library: its import, process group and prints; the engine and loading use it.

The only file that imports DeepSpeed, and only when something of it is asked for: the import takes
seconds.
"""

import collections
import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stages.train_student.distributed import World

_LINEAR = nn.functional.linear


def import_deepspeed() -> Any:
    """The module, ready for the machine at hand."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet():
        import deepspeed
        import deepspeed.ops
    for handler in logging.getLogger("DeepSpeed").handlers:
        if type(handler) is logging.StreamHandler:  # its own, bound to the standard output
            handler.setStream(sys.stderr)
    if on_cpu:
        # Otherwise its compiled CPU operators are built on first use: a minute, or a wait for ever
        # on the lock of a build that was killed.
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    return deepspeed


def join_group(world: World) -> Any:
    """Let DeepSpeed use the process group that is there; return DeepSpeed. May be called again."""
    deepspeed = import_deepspeed()
    with local_rank_in_environment(world), quiet():
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
        )
    return deepspeed


def leave_group() -> None:
    """End the process group and what DeepSpeed changed in this process."""
    deepspeed = import_deepspeed()
    # ZeRO 3 leaves its own in place, which rounds differently: what runs in this process
    # afterwards must not.
    nn.functional.linear = _LINEAR
    # DeepSpeed keeps handles on the group: it must end the group itself to drop them.
    if deepspeed.comm.comm.cdb is not None:
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def why_no_nvme() -> str | None:
    """Why tensors cannot wait on a disk here, or None if they can."""
    if importlib.util.find_spec("ninja") is None:
        return "ninja, which builds DeepSpeed's async_io, is missing: pip install ninja"
    import_deepspeed()
    with quiet():
        from deepspeed.ops.op_builder import AsyncIOBuilder

        possible = AsyncIOBuilder().is_compatible(verbose=False)
    if not possible:
        return (
            "DeepSpeed's async_io cannot be built: it needs a C++ compiler and libaio with its "
            "headers (apt install g++ libaio-dev)"
        )
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Send what DeepSpeed prints to the error stream: the standard output is for results."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
        yield


@contextmanager
def local_rank_in_environment(world: World) -> Iterator[None]:
    """DeepSpeed asks the environment for the local rank, also without a launcher."""
    missing = "LOCAL_RANK" not in os.environ
    if missing:
        os.environ["LOCAL_RANK"] = str(world.local_rank)
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]
