import numpy as np
import pytest

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.clips import ClipsConfig

FRAMES, GRID = 9, (6, 8)


@pytest.fixture
def moving_features():
    """Random tokens on a plane that moves by (dx, dy) tokens a frame, seen through a window."""

    def make(dx, dy, *, num_frames=FRAMES, grid=GRID, channels=96):
        height, width = grid
        margin = num_frames * max(abs(dx), abs(dy))
        plane = np.random.default_rng(0).standard_normal(
            (height + 2 * margin, width + 2 * margin, channels)
        )
        views = [
            plane[margin - t * dy :, margin - t * dx :][:height, :width] for t in range(num_frames)
        ]
        features_THWC = np.stack(views)
        features_THWC /= np.linalg.norm(features_THWC, axis=-1, keepdims=True)
        return features_THWC.astype(np.float16)

    return make


@pytest.fixture
def clips(tmp_path):
    return ClipsConfig(
        path=tmp_path / "clips", num_frames=FRAMES, height=GRID[0] * 16, width=GRID[1] * 16
    )


@pytest.fixture
def write_store(tmp_path):
    """Write one clip's array as a committed store."""

    def write(kind, name, values, *, axes="thwc", key="walk/0007", shard="00000"):
        spec = ArraySpec(dtype=str(values.dtype), shape=values.shape, dimension_names=tuple(axes))
        settings = StoreSettings(kind=kind, arrays={name: spec}, values={"note": "a test"})
        writer = StoreWriter.open(tmp_path / "cache", settings, provenance={})
        with writer.shard(shard, source=f"{shard}.tar") as out:
            out.add(key, {name: values}, {"frames": len(values)})
            out.skip("walk/0008", "too_short", "3 frames")
            out.commit()
        return writer.path

    return write
