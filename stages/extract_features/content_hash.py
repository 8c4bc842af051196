"""Hashes of checkpoints and model folders; settings name the weights by them."""

import hashlib
from pathlib import Path


def sha256_of_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """SHA-256 over the names and bytes of a folder's files, in hexadecimal.

    Hidden files do not count: download tools leave them there. Where the folder lies and when its
    files were written does not matter.

    Raises:
        ValueError: The folder holds no file.
    """
    files = {
        file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()
    }
    names = [name for name in sorted(files) if not any(p.startswith(".") for p in name.split("/"))]
    if not names:
        raise ValueError(f"{folder} holds no files; a part of the base model was expected there")
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{sha256_of_file(files[name])}  {name}\n".encode())
    return whole.hexdigest()
