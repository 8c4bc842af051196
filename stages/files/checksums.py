"""Size and CRC-32C of files, as the records of checkpoints and exports hold them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileChecksum:
    """What a record says of a file."""

    bytes: int
    crc32c: str
    """Eight hexadecimal digits."""

    @classmethod
    def from_json(cls, content: Any) -> "FileChecksum":
        """From `dataclasses.asdict`; `ValueError` where it is something else."""
        match content:
            case {"bytes": int(size), "crc32c": str(crc32c)}:
                return cls(size, crc32c)
        raise ValueError(f"{content!r} is no size and CRC-32C of a file")


def checksum_of(file: Path) -> FileChecksum:
    """Read a file once, in pieces; `OSError` where it cannot be read."""
    size = checksum = 0
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(_PIECE_BYTES):
            size += len(piece)
            checksum = google_crc32c.extend(checksum, piece)
    return FileChecksum(size, f"{checksum:08x}")


def checksum_of_bytes(data: bytes) -> str:
    """CRC-32C of bytes, as eight hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"


def damage_of(file: Path, recorded: FileChecksum) -> str | None:
    """What differs between a file and its record, with the file's name; None for a sound file."""
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
    """Every file below a folder, by its path from there, in order of those paths."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in found))


def checksums_from_json(content: Any) -> Mapping[str, FileChecksum]:
    """Of a record's files, by name; `ValueError` where it is something else."""
    if not isinstance(content, dict):
        raise ValueError(f"{content!r} is no list of files with their checksums")
    return {str(name): FileChecksum.from_json(one) for name, one in content.items()}
