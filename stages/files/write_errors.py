"""Explains failed writes of torch and safetensors, which drop the system's error."""

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

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
