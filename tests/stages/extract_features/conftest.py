"""Fixtures that run stage one, small teacher stores, and helpers to compare stores."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema import StoreSettings, StoreWriter
from stages.clips import ClipsConfig, encode_video
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig
from stages.extract_features.run import extract_features
from stages.extract_features.summary import ExtractSummary
from stages.progress import Progress, SilentProgress
from stages.teacher_store.config import FeatureDtype
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.settings import valid_spec
from tests.fingerprints import fingerprint_of
from tests.stages.conftest import make_frames
from tests.stages.extract_features.changing_dataset import Dataset

MAPS, WIDTH = 5, 12
SHARDS = {
    "00000": ["a/0", "a/1", "a/2"],
    "00001": ["b/0", "b/1"],
    "00001-retry1": ["b/2"],
    "00002": ["c/0"],
    "00003": [],
}
SKIPPED = {"00001": ["b/2", "b/3"], "00003": ["d/0"]}
"""b/2 was skipped at first, and brought in by a retry."""


def teacher_settings(
    dtype: FeatureDtype = "float16", *, native: bool = False, grid: tuple[int, int] = (3, 4)
) -> StoreSettings:
    """Of a store of five maps a clip, whose channels are two parts."""
    arrays = feature_arrays_spec((MAPS, *grid, WIDTH), dtype) | {"valid": valid_spec(MAPS)}
    values: dict[str, Any] = {
        "clips": {"num_frames": 5, "height": 48, "width": 64},
        "checkpoint_sha256": "ab" * 32,
        "grid": list(grid),
        "grid_source": "native" if native else "student",
        "parts": 2,
    }
    return StoreSettings(kind="teacher", arrays=arrays, values=values)


def fused_of(key: str, grid: tuple[int, int]) -> torch.Tensor:
    """Unit tokens of two parts, that follow from the key; one map is of zeros."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
    drawn = torch.randn((MAPS, *grid, 2, WIDTH // 2), generator=torch.Generator().manual_seed(seed))
    weights = torch.tensor([0.6, 0.8])[:, None]
    fused = (torch.nn.functional.normalize(drawn, dim=-1) * weights).flatten(-2)
    fused[3] = 0.0
    return fused


@pytest.fixture
def write_teacher(tmp_path: Path) -> Callable[..., Path]:
    """Writes a teacher store of five shards, one of them a retry; its folder."""

    def write(dtype: FeatureDtype = "float16", *, native: bool = False) -> Path:
        grid = (6, 6) if native else (3, 4)
        settings = teacher_settings(dtype, native=native, grid=grid)
        writer = StoreWriter.open(tmp_path / "cache", settings, provenance={})
        for shard, keys in SHARDS.items():
            with writer.shard(shard, source=f"{shard}.tar") as out:
                for key in keys:
                    valid = np.array([1, 1, 1, 0, 1], np.uint8)
                    arrays = encode_features(fused_of(key, grid), dtype)
                    out.add(
                        key,
                        arrays | {"valid": valid},
                        {"name": key, "quality": 0.9},
                        fingerprint=fingerprint_of(key),
                    )
                for key in SKIPPED.get(shard, []):
                    out.skip(
                        key, "too_short", f"{key} has 3 frames", fingerprint=fingerprint_of(key)
                    )
                out.commit()
        return writer.path

    return write


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path, without what writers keep for themselves."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and ".staging" not in path.parts
    }


def times(store: Path) -> dict[str, int]:
    """When every file of a store was last written, in nanoseconds, by its path."""
    return {str(file): file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}


Extract = Callable[..., ExtractSummary]


@pytest.fixture
def extract(
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> Extract:
    """Runs stage one, by default on `two_shards` into `tmp_path`; `changes` are of its settings."""

    def run(
        cache: Path = tmp_path,
        *,
        clips: ClipsConfig = two_shards,
        base: BaseModelConfig = tiny_base,
        progress: Progress | None = None,
        rank: int = 0,
        world_size: int = 1,
        retry_failed: bool = False,
        refresh_changed: bool = False,
        **changes: Any,
    ) -> ExtractSummary:
        return extract_features(
            extract_config.model_copy(update=changes),
            clips,
            base,
            cache,
            provenance={},
            progress=progress or SilentProgress(),
            rank=rank,
            world_size=world_size,
            retry_failed=retry_failed,
            refresh_changed=refresh_changed,
        )

    return run


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    stub_module: Callable[[pytest.MonkeyPatch], Any],
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
) -> ExtractSummary:
    """An uninterrupted run over everything, with the stub in SAM2's place; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        stub_module(patch)
        return extract_features(
            extract_config,
            two_shards,
            tiny_base,
            tmp_path_factory.mktemp("cache"),
            provenance={},
            progress=SilentProgress(),
        )


@pytest.fixture(scope="session")
def videos() -> list[bytes]:
    """Three different ones for `dataset`."""
    return [encode_video(make_frames(12, 64, 96, seed=number), 8.0) for number in range(3)]


@pytest.fixture
def dataset(
    extract_config: ExtractConfig,
    tiny_base: BaseModelConfig,
    videos: list[bytes],
    tmp_path: Path,
    stub_tracking: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Dataset:
    """Eight clips in three shards, extracted as text and, by the stub, as teacher."""
    metering = "stages.dry_run.extract.matmul_flops_per_second"
    monkeypatch.setattr(metering, lambda *_: 1e9)
    config = extract_config.model_copy(update={"kinds": ("text", "teacher")})
    return Dataset(tmp_path, videos, config, tiny_base)
