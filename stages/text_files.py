"""Text and JSON files that may come from anybody, read within bounds."""

import os
from pathlib import Path
from typing import Any

from cache_schema.places import open_regular
from cache_schema.sealed_json import parse_json

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file: the vocabularies and indexes of models are the largest that are read."""


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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is too large, or holds no JSON object.
        OSError: it cannot be read, or is not a regular file.
    """
    text = read_text(path, MAX_JSON_BYTES)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
