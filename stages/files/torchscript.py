"""TorchScript files: networks that come with their program, read without Python's pickle."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

_PICKLE = re.compile(r".*\.(?:pkl|pickle|pt|pth|bin)")
_OWN_PICKLES = ("data", "constants", "attributes", "traced_inputs")
"""Read by TorchScript's own unpickler; the last one is in files of torch.jit.trace."""
_FILE_CALL = re.compile(rb"\b(?:torch|ops\.aten)\.(save|load|from_file)\(")
"""Calls by which TorchScript reads and writes files of its choice."""


def check_torchscript(file: Path, *, remedy: str) -> None:
    """Refuse a file that is not from torch.jit.save, before torch reads it.

    Its program runs in TorchScript's interpreter, never as Python, but it is a program: use files
    from sources you trust. TorchScript's own unpickler creates tensors and the archive's own
    classes only.

    Args:
        file: The file.
        remedy: What to do about it, for messages.

    Raises:
        ValueError: It is a pickle or a state dict, damaged, or holds pickles that Python would have
            to read or calls that read or write files.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is not a TorchScript archive; pickles are not read, because they can run "
            f"code; {remedy}"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            root = names[0].partition("/")[0] if names else ""
            code = [name for name in names if name.startswith(f"{root}/code/")]
            if not code or f"{root}/constants.pkl" not in names:
                raise ValueError(
                    f"{file} holds no TorchScript program: it was written by torch.save or "
                    f"another program, and its pickles are not read; {remedy}"
                )
            own = {f"{root}/{name}.pkl" for name in _OWN_PICKLES}
            strange = [name for name in names if _PICKLE.fullmatch(name) and name not in own]
            if strange:
                raise ValueError(
                    f"{file} holds {strange[0]}, which is no part of a TorchScript archive; "
                    f"pickles are not read; {remedy}"
                )
            for name in code:
                call = _FILE_CALL.search(archive.read(name)) if name.endswith(".py") else None
                if call is not None:
                    raise ValueError(
                        f"{file}: {name} calls torch.{call[1].decode()}, which accesses files; "
                        f"{remedy}"
                    )
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); download it again") from error


def load_torchscript(file: Path, device: torch.device | str, *, remedy: str) -> Any:
    """Load a network that `check_torchscript` accepts, in evaluation mode.

    Devices that its program names stay what they were when it was traced.

    Raises:
        ValueError: torch cannot read it.
    """
    try:
        return torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} is no working TorchScript ({reason}); {remedy}") from error
