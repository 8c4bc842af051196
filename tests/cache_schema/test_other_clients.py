"""Clients that are not this project's open the arrays: xarray and tensorstore, neither through it.

They see a shard's group as any other Zarr v3 group. What only the commit records say (which clips
there are, under which keys, whether they are whole) they do not see.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import ArraySpec, CorruptClip, StoreReader, StoreSettings, StoreWriter
from tests.fingerprints import fingerprint_of

xarray = pytest.importorskip("xarray")
tensorstore = pytest.importorskip("tensorstore")

KEYS = ("walk/0000", "walk/0001", "läuft")


def _values(spec: ArraySpec, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=spec.shape) * 40
    return values.astype(spec.dtype)


def _clip(settings: StoreSettings, seed: int) -> dict[str, np.ndarray]:
    return {name: _values(spec, seed) for name, spec in settings.arrays.items()}


@pytest.fixture(scope="module", params=["none", "blosc-zstd-shuffle"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one shard with three clips, the last of them all zero."""
    settings = StoreSettings(
        kind="teacher",
        arrays={
            "features": ArraySpec(
                dtype="float16", shape=(5, 6, 4, 3), dimension_names=("t", "h", "w", "c")
            ),
            # Two inner chunks: 1 MiB holds three of its six entries.
            "wide": ArraySpec(
                dtype="float32", shape=(6, 300, 250), dimension_names=("p", "y", "x")
            ),
            "codes": ArraySpec(dtype="int8", shape=(5, 2), dimension_names=("t", "k")),
            "valid": ArraySpec(dtype="uint8", shape=(5,), dimension_names=("t",)),
            "ids": ArraySpec(dtype="int64", shape=(3,), dimension_names=("i",)),
        },
        values={},
    )
    packed = {
        name: replace(spec, compression=request.param) for name, spec in settings.arrays.items()
    }
    settings = replace(settings, arrays=packed)
    writer = StoreWriter.open(tmp_path_factory.mktemp("cache"), settings, provenance={})
    with writer.shard("00000", source="00000.tar") as shard:
        for seed, key in enumerate(KEYS[:-1]):
            shard.add(key, _clip(settings, seed), fingerprint=fingerprint_of(key))
        zero = {name: np.zeros_like(values) for name, values in _clip(settings, 0).items()}
        shard.add(KEYS[-1], zero, fingerprint=fingerprint_of(KEYS[-1]))
        shard.commit()
    return writer.path


def _with_xarray(group: Path, name: str) -> np.ndarray:
    with xarray.open_zarr(str(group), consolidated=False, zarr_format=3, chunks=None) as dataset:
        return dataset[name].load().to_numpy()


def _with_tensorstore(group: Path, name: str) -> np.ndarray:
    return _open_tensorstore(group, name).read().result()


def _open_tensorstore(group: Path, name: str) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{group / name}/"}}
    return tensorstore.open(spec, read=True).result()


@pytest.mark.parametrize("client", [_with_xarray, _with_tensorstore])
def test_other_clients_read_the_values_that_were_written(
    written: Path, client: Callable[[Path, str], np.ndarray]
) -> None:
    reader = StoreReader(written)
    for name, spec in reader.settings.arrays.items():
        found = client(written / "shards" / "00000", name)
        assert found.shape == (len(KEYS), *spec.shape)
        assert found.dtype == spec.dtype
        for key in KEYS:
            np.testing.assert_array_equal(found[reader.record(key).index], reader.read(key)[name])
        np.testing.assert_array_equal(found[0], _values(spec, 0))


def test_xarray_names_the_axes(written: Path) -> None:
    group = str(written / "shards" / "00000")
    with xarray.open_zarr(group, consolidated=False, zarr_format=3, chunks=None) as dataset:
        assert set(dataset.data_vars) == {"features", "wide", "codes", "valid", "ids"}
        assert dataset["features"].dims == ("clip", "t", "h", "w", "c")
        assert dataset["valid"].dims == ("clip", "t")


def test_tensorstore_reads_some_frames_of_one_clip(written: Path) -> None:
    array = _open_tensorstore(written / "shards" / "00000", "wide")
    assert array.domain.labels == ("clip", "p", "y", "x")
    expected = StoreReader(written).read(KEYS[1])["wide"]
    np.testing.assert_array_equal(array[1, 2:5].read().result(), expected[2:5])


@pytest.mark.parametrize("client", [_with_xarray, _with_tensorstore])
def test_other_clients_take_an_absent_file_for_fill_and_this_reader_does_not(
    written: Path, tmp_path: Path, client: Callable[[Path, str], np.ndarray]
) -> None:
    """Why a file that a record names is compared with the record before it is believed."""
    store = shutil.copytree(written, tmp_path / written.name)
    record = StoreReader(store).record(KEYS[1]).arrays["features"]
    (store / "shards" / "00000" / record.path).unlink()
    assert np.isnan(client(store / "shards" / "00000", "features")[1]).all()
    with pytest.raises(CorruptClip, match="walk/0001"):
        StoreReader(store).read(KEYS[1])
