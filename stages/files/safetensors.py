"""Writing of safetensors files with the permissions that the umask gives."""

import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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
