"""Both encodings of the teacher from one pass of a tiny SAM2, and the derived Gram flow."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import StoreReader, verify_store
from stages.clips import ClipsConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.derive import derive_gram_flow
from stages.local_gram_flow import regrid_fused
from stages.progress import SilentProgress
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.features import decode_features
from tests.stages.extract_features.conftest import Extract, files_of
from tests.stages.local_gram_flow.reference import similarities_by_loop

TRACKED: tuple[Kind, ...] = ("teacher", "gram_flow", "masks")


@pytest.fixture
def extract_stores(
    extract: Extract, extract_config: ExtractConfig, tmp_path: Path
) -> Callable[..., dict[Kind, Path]]:
    """Extracts with the tiny SAM2 into a folder of `tmp_path`; the stores by kind."""

    def run(
        folder: str,
        *,
        kinds: tuple[Kind, ...] = TRACKED,
        gram_flow: GramFlowConfig,
        retry_failed: bool = False,
        **teacher: Any,
    ) -> dict[Kind, Path]:
        summary = extract(
            tmp_path / folder,
            kinds=kinds,
            gram_flow=gram_flow,
            teacher=extract_config.teacher.model_copy(update=teacher),
            retry_failed=retry_failed,
        )
        return {kind.kind: kind.store for kind in summary.kinds}

    return run


def derive(teacher: Path, root: Path, clips: ClipsConfig, config: GramFlowConfig) -> Path:
    return derive_gram_flow(
        root,
        teacher,
        config=config,
        token_grid=clips.token_grid,
        device=torch.device("cpu"),
        provenance={},
        progress=SilentProgress(),
    ).store


@pytest.mark.parametrize(
    ("teacher", "flow"),
    [
        ({}, {"radius": 3, "dtype": "float16"}),
        ({"dtype": "int8", "time_rate": "latent"}, {"radius": 1, "dtype": "float16"}),
        ({"grid": "native"}, {"radius": 2, "dtype": "uint8"}),
        ({"grid": "native", "dtype": "int8", "fusion": "forward"}, {"radius": 2}),
    ],
)
def test_extracted_and_derived_stores_are_equal_file_by_file(
    extract_stores: Callable[..., dict[Kind, Path]],
    two_shards: ClipsConfig,
    tmp_path: Path,
    teacher: Mapping[str, Any],
    flow: Mapping[str, Any],
) -> None:
    config = GramFlowConfig(**flow)
    stores = extract_stores("extracted", gram_flow=config, **teacher)
    # The clip that cannot be decoded is tried again: a shard without clips in both.
    extract_stores("extracted", gram_flow=config, retry_failed=True, **teacher)
    derived = derive(stores["teacher"], tmp_path / "derived", two_shards, config)
    assert derived.name == stores["gram_flow"].name
    files = files_of(stores["gram_flow"])
    assert "commits/00001-retry1.json" in files
    assert files_of(derived) == files
    assert all(verify_store(store).problems == () for store in (*stores.values(), derived))


def test_the_flow_is_that_of_the_features_stored_beside_it(
    extract_stores: Callable[..., dict[Kind, Path]], two_shards: ClipsConfig
) -> None:
    stores = extract_stores("cache", gram_flow=GramFlowConfig(radius=2), grid="native")
    teacher, flow = StoreReader(stores["teacher"]), StoreReader(stores["gram_flow"])
    parts = teacher.settings.values["parts"]
    assert isinstance(parts, int)
    assert list(flow.keys) == list(teacher.keys)
    for key in list(flow.keys)[:2]:
        stored = teacher.read(key)
        features = torch.from_numpy(stored["features"]).double()
        regridded = regrid_fused(features, *two_shards.token_grid, parts).numpy()
        visited = np.any(regridded, axis=(1, 2, 3))
        expected, _ = similarities_by_loop(np.where(regridded == 0, 1e-30, regridded)[None], 2)
        pairs = visited[:-1] & visited[1:]
        found = flow.read(key)
        assert np.abs(found["gram_flow"] - expected[0])[pairs].max() < 2**-11 + 1e-6
        assert pairs.any()
        np.testing.assert_array_equal(found["valid"], stored["valid"])


def test_the_flow_alone_is_the_same_store(extract_stores: Callable[..., dict[Kind, Path]]) -> None:
    config = GramFlowConfig(radius=2)
    together = extract_stores("together", gram_flow=config)
    alone = extract_stores("alone", kinds=("gram_flow",), gram_flow=config)
    assert list(alone) == ["gram_flow"]
    assert files_of(alone["gram_flow"]) == files_of(together["gram_flow"])


def test_every_tracked_store_says_how_a_clip_was_made(
    extract_stores: Callable[..., dict[Kind, Path]], two_shards: ClipsConfig
) -> None:
    stores = extract_stores("cache", gram_flow=GramFlowConfig())
    for store in stores.values():
        reader = StoreReader(store)
        for key in reader.keys:
            attributes: dict[str, Any] = reader.record(key).attributes
            assert attributes["num_frames"] == two_shards.num_frames
            assert isinstance(attributes["prompt"], dict)
            assert 0 <= attributes["quality"] <= 1


def test_int8_features_are_the_float16_ones_within_half_a_scale(
    extract_stores: Callable[..., dict[Kind, Path]],
) -> None:
    flow = GramFlowConfig()
    halves = StoreReader(extract_stores("halves", kinds=("teacher",), gram_flow=flow)["teacher"])
    store = extract_stores("bytes", kinds=("teacher",), gram_flow=flow, dtype="int8")["teacher"]
    reader = StoreReader(store)
    assert list(reader.keys) == list(halves.keys)
    for key in reader.keys:
        arrays = {name: torch.from_numpy(values) for name, values in reader.read(key).items()}
        wanted = torch.from_numpy(halves.read(key)["features"]).float()
        off = (decode_features(arrays) - wanted).abs()
        # Half a scale, and what float16 had rounded off already.
        assert (off <= 0.50001 * arrays["scale"].float()[..., None] + wanted.abs() * 2**-11).all()
    assert math.isclose(reader.num_bytes, halves.num_bytes / 2, rel_tol=0.1)
