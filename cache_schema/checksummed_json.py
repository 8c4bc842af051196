"""JSON records that contain their own checksum.

A record is an ordinary JSON object whose first member is `"crc32c"`: the CRC-32C of the whole file,
computed with that member's eight digits set to `00000000`.
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
"""Maximum nesting depth of lists and mappings in a record."""

_HEAD = b'{\n "crc32c": "'
_ZERO_CRC32C = b"00000000"
HEAD_BYTES = len(_HEAD) + len(_ZERO_CRC32C)
"""Length of the start of a record, up to and including its checksum."""

_RECORD_START = re.compile(re.escape(_HEAD) + rb'([0-9a-f]{8})",\n')


def crc32c_hex(data: bytes | np.ndarray) -> str:
    """CRC-32C (Castagnoli) of bytes or of a contiguous array, as eight hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, but raises `ValueError` where nesting exceeds the recursion limit."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists and objects are nested too deep") from None


def plain_json(value: Any, name: str, *, depth: int = MAX_DEPTH) -> JSON:
    """Copy `value` into JSON's own types; tuples become lists.

    Raises `ValueError`, with the path inside `name`, for anything that JSON cannot hold exactly:
    other types (numpy scalars and paths included), NaN, infinities, unpaired surrogates; and for
    more than `depth` nested lists and mappings.
    """
    if depth < 0:
        raise ValueError(f"{name} is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        if value - value != 0.0:
            raise ValueError(f"{name} is {value}; only finite numbers can be stored")
        return value
    if type(value) is str:
        return _plain_text(value, name)
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{name}[{i}]", depth=depth - 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return plain_mapping(value, name, depth=depth)
    raise ValueError(
        f"{name} is a {type(value).__name__}; convert it to a bool, int, float, str, list or dict"
    )


def plain_mapping(
    value: Mapping[str, Any], name: str, *, depth: int = MAX_DEPTH
) -> dict[str, JSON]:
    """`plain_json` for a mapping, whose keys must be text."""
    for key in value:
        if type(key) is not str:
            raise ValueError(f"{name} has the key {key!r}; keys must be text")
        _plain_text(key, f"a key of {name}")
    return {key: plain_json(item, f"{name}.{key}", depth=depth - 1) for key, item in value.items()}


def _plain_text(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {text!r}, which is not valid Unicode text") from None
    return text


def encode_record(record: Mapping[str, JSON]) -> bytes:
    """Encode a record with its checksum and schema version. `record` must not contain `crc32c`."""
    members = {"crc32c": _ZERO_CRC32C.decode(), "schema_version": SCHEMA_VERSION, **record}
    lines = (f" {_compact(name)}: {_by_line(value)}" for name, value in members.items())
    data = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(
            f"a record of {len(data)} bytes exceeds the limit of {MAX_RECORD_BYTES}; "
            "make shards of fewer clips"
        )
    return data.replace(_ZERO_CRC32C, crc32c_hex(data).encode(), 1)


def _by_line(value: JSON) -> str:
    """Encode one member of a record with each of its items, such as a clip, on a line."""
    if isinstance(value, dict) and value:
        items = (f"  {_compact(name)}: {_compact(item)}" for name, item in value.items())
        return "{\n" + ",\n".join(items) + "\n }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {_compact(item)}" for item in value) + "\n ]"
    return _compact(value)


# `json` encodes with indentation in Python instead of C, which takes five times as long.
_compact = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def crc32c_digits(data: bytes) -> bytes:
    """The digits of a record's `crc32c` member, or whatever bytes are in their place."""
    return data[len(_HEAD) : HEAD_BYTES]


def has_valid_checksum(data: bytes) -> bool:
    """Whether the bytes start with their own checksum, whatever else they contain."""
    match = _RECORD_START.match(data)
    start = len(_HEAD)
    blank = data[:start] + _ZERO_CRC32C + data[start + len(_ZERO_CRC32C) :]
    return match is not None and match.group(1).decode() == crc32c_hex(blank)


def decode_record(data: bytes, location: str, *, store: Path | str) -> dict[str, Any]:
    """Decode a record and verify its checksum and schema version.

    Args:
        data: the file's bytes.
        location: path of the file, for error messages.
        store: folder or URL of the store, subject of the errors' remedies.

    Raises `UnknownSchemaVersion` for a record of another schema version, `CorruptRecord` for a
    damaged one.
    """
    try:
        record = parse_json(data)
    except ValueError as error:
        raise CorruptRecord(
            f"{location} is not JSON ({error})", remedy="repair", subject=store
        ) from error
    if not isinstance(record, dict) or "schema_version" not in record:
        raise CorruptRecord(
            f"{location} is not a record of a feature store: it has no schema_version",
            remedy="repair",
            subject=store,
        )
    found = record["schema_version"]
    older = type(found) is int and 1 <= found < SCHEMA_VERSION
    if not older and (found != SCHEMA_VERSION or type(found) is not int):
        # Another schema version may use another checksum, so it cannot be verified here.
        raise UnknownSchemaVersion(
            f"{location} has schema version {found!r}, and this version of the package reads "
            f"{SCHEMA_VERSION}; update this package to read the store"
        )
    if not has_valid_checksum(data):
        raise CorruptRecord(
            f"{location} is damaged: its contents do not match their checksum",
            remedy="repair",
            subject=store,
        )
    if older:
        raise UnknownSchemaVersion(
            f"{location} has schema version {found}, and this version of the package reads "
            f"{SCHEMA_VERSION}",
            remedy="make again",
            subject=store,
        )
    del record["crc32c"], record["schema_version"]
    return record
