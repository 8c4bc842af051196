"""Writing of safetensors files, and the reasons why writes of tensors fail."""

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the mode that the umask gives.

    `save_file` on its own creates files of mode 0600, since it writes to a temporary file first.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)


@contextmanager
def umask_modes(folder: Path) -> Iterator[None]:
    """Set safetensors files that a library writes to `folder` to the mode that the umask gives."""
    yield
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


_TORCH_WRITES = ("PytorchStreamWriter", "file write failed", "unexpected pos")
"""Fragments of the messages of torch.save when a write fails."""


def write_error_reason(error: Exception, folder: Path) -> str | None:
    """The reason why a file below `folder` could not be written, with the free space on its disk.

    None if the error is not a failed write. torch and safetensors drop the system's error number,
    so a disk with less than 1 MiB free is assumed to be full.
    """
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        reason = error.strerror or str(error)
    elif isinstance(error, SafetensorError) or any(part in str(error) for part in _TORCH_WRITES):
        reason = str(error).splitlines()[0]
    else:
        return None
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < 1 << 20:
        reason = os.strerror(errno.ENOSPC)
    return f"{reason} ({free / 1e9:.2f} GB are free on that disk)"
