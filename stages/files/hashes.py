"""SHA-256 of files, of some of a folder's files, and of whole folders."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def sha256_of_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_files(folder: Path, names: Iterable[str]) -> str:
    """Return the SHA-256 of the names and bytes of some of a folder's files in hexadecimal.

    Args:
        folder: Does not matter by itself.
        names: Relative to the folder, with `/`; their order does not matter.
    """
    whole = hashlib.sha256()
    for name in sorted(names):
        whole.update(f"{sha256_of_file(folder / name)}  {name}\n".encode())
    return whole.hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """Return the SHA-256 of the names and bytes of a folder's files in hexadecimal.

    Hidden files, which download tools create, are ignored. The hash does not depend on the
    folder's location or on modification times.

    Raises:
        ValueError: The folder holds no files.
    """
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names = [name for name in files if not any(p.startswith(".") for p in name.split("/"))]
    if not names:
        raise ValueError(f"{folder} holds no files; expected a part of the base model")
    return sha256_of_files(folder, names)
