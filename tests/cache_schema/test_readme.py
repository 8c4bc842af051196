"""The examples in cache_schema/README.md are what the code writes, byte for byte."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

import cache_schema
from cache_schema import ArraySpec, StoreSettings, StoreWriter

README = Path(cache_schema.__file__).with_name("README.md")


def _example(root: Path) -> Path:
    """The store that the README shows: one finished shard, and one being written."""
    spec = ArraySpec(dtype="float16", shape=(49, 8, 12, 16), dimension_names=("t", "h", "w", "c"))
    settings = StoreSettings(
        kind="teacher",
        arrays={"features": spec},
        values={"checkpoint": "sha256:9f2c", "forward_weight": 0.5, "fps": 8},
    )
    values = (np.arange(np.prod(spec.shape)) % 7).reshape(spec.shape).astype("float16")
    writer = StoreWriter.open(root, settings, provenance={"sam2videox": "0.1.0"})
    with writer.shard("00000", source="00000.tar") as shard:
        shard.add("walk/0000", {"features": values}, {"source_fps": 24.0, "prompt": "mask"})
        shard.add("walk/0001", {"features": -values}, {"source_fps": 8.0, "prompt": "box"})
        shard.skip("walk/0002", "too_short", "has 12 frames, needs 49")
        shard.commit()
    with writer.shard("00001", source="00001.tar") as shard:
        shard.add("run/0000", {"features": values}, {"source_fps": 8.0, "prompt": "mask"})
    return writer.path


def test_the_json_shown_is_the_json_written(tmp_path: Path) -> None:
    store = _example(tmp_path)
    shown = re.findall(r"```json\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    files = [
        "store.json",
        "commits/00000.json",
        ".staging/00001/records/00000000.json",
    ]
    assert shown == [(store / file).read_text("utf-8") for file in files]


def test_the_tree_shown_is_the_tree_written(
    tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> None:
    store = _example(tmp_path)
    (tree,) = re.findall(r"```text\n(teacher-.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    lines = [line.split("  #")[0].rstrip() for line in tree.splitlines()]
    assert lines[0] == f"{store.name}/"
    folders: list[str] = []
    shown = set()
    for line in lines[1:]:
        depth = (len(line) - len(line.lstrip())) // 4
        folders[depth - 1 :] = [line.strip()]
        if not line.endswith("/"):
            shown.add("".join(folders))
    assert shown == set(files_of(store))
