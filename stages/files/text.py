"""Text and JSON files that may come from anybody, read within bounds."""

import os
from pathlib import Path
from typing import Any

from cache_schema.checksummed_json import MAX_DEPTH, parse_json
from cache_schema.storage import open_regular

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file: the vocabularies and indexes of models are the largest that are read."""

_IN_WORDS = {int: "a number of at least 0", str: "text", list: "a list", dict: "an object"}


def read_text(path: Path, limit: int) -> str:
    """A regular file of at most `limit` bytes of UTF-8.

    Raises:
        ValueError: it is larger, or not UTF-8.
        OSError: it cannot be read, or is not a regular file.
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
    """The JSON object in a file.

    Args:
        path: the file.
        fields: types of the members that it must have; an `int` is of 0 to 2^63.

    Raises:
        ValueError: the file is too large, holds no JSON object, or one that is nested too deep or
            has another member.
        OSError: it cannot be read, or is not a regular file.
    """
    text = read_text(path, MAX_JSON_BYTES)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    _refuse_depth(content, path)
    for name, kind in fields.items():
        value = content.get(name)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**63):
            raise ValueError(
                f"{path} is damaged: {name} is {value!r:.80}, expected {_IN_WORDS[kind]}; restore "
                "it from a copy"
            )
    return content


def _refuse_depth(content: Any, path: Path) -> None:
    """Before functions that call themselves see it."""
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
