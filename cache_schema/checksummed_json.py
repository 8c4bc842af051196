"""JSON files that carry their own checksum; used for every record of a store.

A sealed file is an ordinary JSON object whose first member is `"crc32c"`: the CRC-32C of the whole
file, computed with that member's eight digits set to `00000000`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from cache_schema.errors import CorruptRecord, UnknownSchemaVersion
from cache_schema.names import MAX_RECORD_BYTES, SCHEMA_VERSION

JSON = bool | int | float | str | None | list["JSON"] | dict[str, "JSON"]

MAX_DEPTH = 64
"""How deep lists and mappings of a record are nested at most."""

_HEAD = b'{\n "crc32c": "'
_UNSEALED = b"00000000"
HEAD_BYTES = len(_HEAD) + len(_UNSEALED)
"""As much of a sealed file as ends with its own checksum."""

_SEALED = re.compile(re.escape(_HEAD) + rb'([0-9a-f]{8})",\n')


def crc32c_hex(data: bytes | np.ndarray) -> str:
    """CRC-32C (Castagnoli) of bytes, or of a contiguous array's, as eight hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with `ValueError` for what is nested deeper than the interpreter can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists and objects are nested too deep") from None


def plain_json(value: Any, where: str, *, depth: int = MAX_DEPTH) -> JSON:
    """Copy of `value` in JSON's own types; tuples become lists.

    Raises `ValueError`, naming the place inside `where`, for anything that JSON cannot hold
    exactly: other types (numpy scalars and paths included), NaN, infinities, unpaired surrogates;
    and for more than `depth` lists and mappings inside each other.
    """
    if depth < 0:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        if value - value != 0.0:
            raise ValueError(f"{where} is {value}; only finite numbers can be stored")
        return value
    if type(value) is str:
        return _plain_text(value, where)
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{where}[{i}]", depth=depth - 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return plain_mapping(value, where, depth=depth)
    raise ValueError(
        f"{where} is a {type(value).__name__}; convert it to a bool, int, float, str, list or dict"
    )


def plain_mapping(
    value: Mapping[str, Any], where: str, *, depth: int = MAX_DEPTH
) -> dict[str, JSON]:
    """`plain_json` for a mapping, whose keys must be text."""
    for key in value:
        if type(key) is not str:
            raise ValueError(f"{where} has the key {key!r}; keys must be text")
        _plain_text(key, f"a key of {where}")
    return {key: plain_json(item, f"{where}.{key}", depth=depth - 1) for key, item in value.items()}


def _plain_text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} is {text!r}, which is not valid Unicode text") from None
    return text


def seal(record: Mapping[str, JSON]) -> bytes:
    """The bytes of a sealed file. `record` has no `crc32c` of its own."""
    sealed = {"crc32c": _UNSEALED.decode(), "schema_version": SCHEMA_VERSION, **record}
    lines = (f" {_compact(name)}: {_by_line(value)}" for name, value in sealed.items())
    data = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(
            f"a record of {len(data)} bytes cannot be written, at most {MAX_RECORD_BYTES} fit; "
            "make shards of fewer clips"
        )
    return data.replace(_UNSEALED, crc32c_hex(data).encode(), 1)


def _by_line(value: JSON) -> str:
    """A member of a record: what is in it item by item, each on a line, such as a clip."""
    if isinstance(value, dict) and value:
        items = (f"  {_compact(name)}: {_compact(item)}" for name, item in value.items())
        return "{\n" + ",\n".join(items) + "\n }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {_compact(item)}" for item in value) + "\n ]"
    return _compact(value)


# An encoder that indents is not written in C, and takes five times as long.
_compact = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def opening_crc32c(data: bytes) -> bytes:
    """The digits that a sealed file opens with, or whatever else stands there."""
    return data[len(_HEAD) : HEAD_BYTES]


def is_sealed(data: bytes) -> bool:
    """Whether the bytes open with their own checksum, whatever else they hold."""
    match = _SEALED.match(data)
    start = len(_HEAD)
    blank = data[:start] + _UNSEALED + data[start + len(_UNSEALED) :]
    return match is not None and match.group(1).decode() == crc32c_hex(blank)


def unseal(data: bytes, where: str, *, store: Path | str) -> dict[str, Any]:
    """The record of a sealed file.

    Args:
        data: the file's bytes.
        where: names the file in errors.
        store: the folder or URL of its store, which an error names.

    Raises `UnknownSchemaVersion` for another layout's record, `CorruptRecord` for a damaged one.
    """
    try:
        record = parse_json(data)
    except ValueError as error:
        raise CorruptRecord(f"{where} is not JSON ({error})") from error
    if not isinstance(record, dict) or "schema_version" not in record:
        raise CorruptRecord(f"{where} is not a record of a feature store: no schema_version")
    found = record["schema_version"]
    older = type(found) is int and 1 <= found < SCHEMA_VERSION
    if not older and (found != SCHEMA_VERSION or type(found) is not int):
        # Another layout may be sealed in another way, so its checksum says nothing here.
        raise UnknownSchemaVersion(
            f"{where} has schema version {found!r}, and this version of the package reads "
            f"{SCHEMA_VERSION}; update this package to read the store"
        )
    if not is_sealed(data):
        raise CorruptRecord(f"{where} is damaged: its contents do not match their checksum")
    if older:
        raise UnknownSchemaVersion(
            f"{where} has schema version {found}, and this version of the package reads "
            f"{SCHEMA_VERSION}; its clips must be extracted again: set another cache folder, or "
            f"remove {store}, and run sam2vx-pipeline extract-features"
        )
    del record["crc32c"], record["schema_version"]
    return record
