"""Reading of text and JSON files from untrusted sources, with limits on size and nesting."""

import os
from pathlib import Path
from typing import Any

from cache_schema.checksummed_json import MAX_DEPTH, parse_json
from cache_schema.storage import open_regular

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file read; vocabularies and weight indexes of models are the largest in use."""

_TYPE_NAMES = {int: "a non-negative integer", str: "a string", list: "a list", dict: "an object"}


def read_text(path: Path, limit: int) -> str:
    """Read a regular file of at most `limit` bytes of UTF-8 text.

    Raises:
        ValueError: the file is larger, or not UTF-8.
        OSError: the file cannot be read, or is not a regular file.
    """
    with open(open_regular(str(path)), "rb") as file:  # noqa: PTH123
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} has {size:,} bytes, at most {limit:,} are read")
        try:
            return file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error})") from error


def read_object(path: Path, **fields: type) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.
        fields: required members and their types; an `int` must be in [0, 2^63).

    Raises:
        ValueError: the file is too large or not a JSON object, the object is nested too deeply, or
            a required member is missing or of the wrong type.
        OSError: the file cannot be read, or is not a regular file.
    """
    text = read_text(path, MAX_JSON_BYTES)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    _check_depth(content, path)
    for name, kind in fields.items():
        value = content.get(name)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**63):
            raise ValueError(
                f"{path} is damaged: {name} is {value!r:.80}, expected {_TYPE_NAMES[kind]}; "
                "restore it from a copy"
            )
    return content


def _check_depth(content: Any, path: Path) -> None:
    """Limit the nesting depth, so that recursive functions can process the content."""
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"{path} is nested more than {MAX_DEPTH} levels deep")
