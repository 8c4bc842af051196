"""What torch and safetensors do not tell of a file that they could not write: where, and why."""

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

_TORCH_WRITES = ("PytorchStreamWriter", "file write failed", "unexpected pos")
"""Parts of what torch.save says where the system refused a write."""


def why_not_written(error: Exception, folder: Path) -> str | None:
    """Why a file below `folder` could not be written, with the space left on its disk.

    None for an error of another kind. torch and safetensors drop the system's error number, so that
    a disk without a free block is taken for the reason.
    """
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        reason = error.strerror or str(error)
    elif isinstance(error, SafetensorError) or any(part in str(error) for part in _TORCH_WRITES):
        reason = str(error).splitlines()[0]
    else:
        return None
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < 1 << 20:
        reason = os.strerror(errno.ENOSPC)
    return f"{reason} ({free / 1e9:.2f} GB are free on that disk)"
