"""Edit records and indexes and recompute their checksums."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from cache_schema.packed_strings import PackedText


def seal(record: dict[str, Any]) -> bytes:
    """A record with its own checksum, whatever is in it."""
    text = json.dumps({**record, "crc32c": "0" * 8}, indent=1)
    data = f"{text}\n".encode()
    return data[:14] + b"%08x" % google_crc32c.value(data) + data[22:]


def tamper(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a record in place."""
    record = json.loads(path.read_bytes())
    change(record)
    path.write_bytes(seal(record))


def tamper_index(store: Path, **changed: Any) -> None:
    """Put other columns into an index; a list of texts for a column of texts, '.' as '__'."""
    columns = dict(np.load(store / "index.npz"))
    for name, values in changed.items():
        column = name.replace("__", ".")
        if f"{column}.text" in columns:
            text = PackedText.from_utf8(v if isinstance(v, bytes) else v.encode() for v in values)
            columns |= {f"{column}.text": text.blob, f"{column}.ends": text.ends}
        else:
            columns[column] = np.asarray(values, columns[column].dtype)
    with (store / "index.npz").open("wb") as file:
        np.savez(file, **columns)
