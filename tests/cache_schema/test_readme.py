"""The examples in cache_schema/README.md equal what the code writes, byte for byte."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import cache_schema
from cache_schema import (
    ArraySpec,
    StoreReader,
    StoreSettings,
    StoreWriter,
    attribute_table,
    errors,
)
from cache_schema.maintenance.repair import repair_store
from tests.cache_schema.made_stores import files_of
from tests.fingerprints import fingerprint_of

README = Path(cache_schema.__file__).with_name("README.md").read_text("utf-8")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The store that the README shows.

    One shard as it was written, one whose second clip was damaged and taken out by a repair, and
    one being written.
    """
    spec = ArraySpec(dtype="float16", shape=(49, 8, 12, 16), dimension_names=("t", "h", "w", "c"))
    settings = StoreSettings(
        kind="teacher",
        arrays={"features": spec},
        values={"checkpoint": "sha256:9f2c", "forward_weight": 0.5, "fps": 8},
    )
    values = (np.arange(np.prod(spec.shape)) % 7).reshape(spec.shape).astype("float16")
    writer = StoreWriter.open(tmp_path, settings, provenance={"sam2videox": "0.1.0"})
    with writer.shard("00000", source="00000.tar") as shard:
        shard.add(
            "walk/0000",
            {"features": values},
            {"num_frames": 49, "quality": 0.93},
            fingerprint=fingerprint_of("walk/0000"),
        )
        shard.add(
            "walk/0001",
            {"features": -values},
            {"num_frames": 49, "quality": 0.88},
            fingerprint=fingerprint_of("walk/0001"),
        )
        shard.skip(
            "walk/0002",
            "too_short",
            "has 12 frames, needs 49",
            fingerprint=fingerprint_of("walk/0002"),
        )
        shard.commit()
    with writer.shard("00001", source="00001.tar") as shard:
        shard.add(
            "run/0000",
            {"features": values},
            {"num_frames": 49, "quality": 0.91},
            fingerprint=fingerprint_of("run/0000"),
        )
        shard.add(
            "run/0001",
            {"features": values},
            {"num_frames": 49, "quality": 0.9},
            fingerprint=fingerprint_of("run/0001"),
        )
        shard.commit()
    (writer.path / "shards/00001/features/c.1.0.0.0.0").write_bytes(b"damaged")
    repair_store(writer.path)
    with writer.shard("00002", source="00002.tar") as shard:
        shard.add(
            "jump/0000",
            {"features": values},
            {"num_frames": 49, "quality": 0.95},
            fingerprint=fingerprint_of("jump/0000"),
        )
    (staging,) = writer.path.glob(".staging/00002/*")
    staging.rename(staging.with_name("5f0c1d9be27a4836"))
    return writer.path


def test_the_json_shown_is_the_json_written(example: Path) -> None:
    shown = re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)
    files = [
        "store.json",
        "commits/00000.json",
        ".staging/00002/5f0c1d9be27a4836/staged/records/00000000.json",
    ]
    assert shown == [(example / file).read_text("utf-8") for file in files]


def test_the_tree_shown_is_the_tree_written(example: Path) -> None:
    (tree,) = re.findall(r"```text\n(teacher-.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].rstrip() for line in tree.splitlines()]
    assert lines[0] == f"{example.name}/"
    folders: list[str] = []
    shown = set()
    for line in lines[1:]:
        depth = (len(line) - len(line.lstrip())) // 4
        folders[depth - 1 :] = [line.strip()]
        if not line.endswith("/"):
            shown.add("".join(folders))
    assert shown == set(files_of(example))


def listed_columns(section: str) -> dict[str, str]:
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([a-z.<>_0-9]+)` \| `([<a-zA-Z0-9]+)` \|", text, flags=re.M))


def test_the_attribute_table_has_the_columns_listed() -> None:
    of_all = {"<number>": attribute_table.NUMBERS, "<text>": attribute_table.TEXTS}
    listed = listed_columns("attributes.npz")
    for placeholder, names in of_all.items():
        for column in [column for column in listed if placeholder in column]:
            dtype = listed.pop(column)
            listed |= {column.replace(placeholder, name): dtype for name in names}
    assert listed == attribute_table.COLUMNS
    assert all(f"`{name}`" in README for names in of_all.values() for name in names)


def test_the_index_has_the_columns_listed(example: Path) -> None:
    listed = listed_columns("index.npz")
    expected = {name.replace("<array>", "features"): dtype for name, dtype in listed.items()}
    with np.load(example / "index.npz", allow_pickle=False) as index:
        found = {name: index[name].dtype.str.lstrip("|") for name in index.files}
    assert found == expected


def test_the_codecs_shown_are_the_codecs_written(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```jsonc\n(.*?)```", README, flags=re.DOTALL)
    codecs = json.loads(re.sub(r"//.*", "", shown))
    for compression, expected in codecs.items():
        spec = ArraySpec(
            dtype="float16", shape=(4,), dimension_names=("t",), compression=compression
        )
        settings = StoreSettings(kind="k", arrays={"a": spec}, values={})
        writer = StoreWriter.open(tmp_path / compression, settings, provenance={})
        with writer.shard("0", source="0") as shard:
            shard.commit()
        metadata = json.loads((writer.path / "shards/0/a/zarr.json").read_text("utf-8"))
        (sharding,) = metadata["codecs"]
        assert sharding["configuration"]["codecs"] == expected


def test_every_error_is_listed() -> None:
    classes = {
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, errors.CacheError)
    }
    listed = set(re.findall(r"^\| `([A-Z][A-Za-z]+)` \|", README, flags=re.M))
    assert listed == classes - {"CacheError"}


def test_the_python_shown_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    features = np.zeros((49, 8, 12, 16), "float16")
    keys = ("walk/0000", "walk/0001")
    names = {"clips": [(key, features, fingerprint_of(key)) for key in keys]}
    exec(code, names)
    assert isinstance(names["reader"], StoreReader)
    assert list(names["reader"].keys) == ["walk/0000", "walk/0001"]
