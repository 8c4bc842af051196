"""Sizes and CRC-32C checksums of files, as stored in the records of checkpoints and exports."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileChecksum:
    """Size and checksum of one file."""

    bytes: int
    crc32c: str
    """Eight hexadecimal digits."""

    @classmethod
    def from_json(cls, content: Any) -> "FileChecksum":
        """Parse the output of `dataclasses.asdict`; `ValueError` if it is malformed."""
        match content:
            case {"bytes": int(size), "crc32c": str(crc32c)}:
                return cls(size, crc32c)
        raise ValueError(f"expected the size and CRC-32C of a file, got {content!r}")


def checksum_of(file: Path) -> FileChecksum:
    """Compute the checksum of a file, read in chunks; `OSError` if it cannot be read."""
    size = checksum = 0
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum = google_crc32c.extend(checksum, chunk)
    return FileChecksum(size, f"{checksum:08x}")


def describe_damage(file: Path, recorded: FileChecksum) -> str | None:
    """Describe how a file differs from its record, naming the file; None if it is intact."""
    try:
        size = file.stat().st_size
        if size != recorded.bytes:
            return f"{file.name} has {size} bytes, its record says {recorded.bytes}"
        found = checksum_of(file)
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror or error})"
    if found == recorded:
        return None
    return f"{file.name} has the CRC-32C {found.crc32c}, its record says {recorded.crc32c}"


def files_below(folder: Path) -> dict[str, Path]:
    """All files below a folder, keyed by their relative path and sorted by it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in found))


def checksums_from_json(content: Any) -> Mapping[str, FileChecksum]:
    """Parse the checksums of a record, by file name; `ValueError` if they are malformed."""
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping of file names to checksums, got {content!r}")
    return {str(name): FileChecksum.from_json(one) for name, one in content.items()}
