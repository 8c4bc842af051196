from functools import cache

import numpy as np
import pytest

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.clips import ClipDataset, ClipRecord, ClipsConfig, encode_video
from tests.fingerprints import fingerprint_of

FRAMES, GRID = 9, (6, 8)


@cache
def grey_video(num_frames, height, width):
    """A video whose frame t has the grey level 20 t."""
    levels = 20 * np.arange(num_frames, dtype=np.uint8)
    shape = (num_frames, height, width, 3)
    return encode_video(np.broadcast_to(levels[:, None, None, None], shape), 8.0)


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
def write_store(tmp_path, clips):
    """Write clips' arrays as a committed store; the same arrays under every key.

    Teacher and masks stores get `valid`, all ones unless it is given, none if it is None. The clips
    are of `dataset`'s video unless another is given.
    """

    def write(
        kind,
        name,
        values,
        *,
        axes="thwc",
        keys=("walk/0007",),
        shard="00000",
        settings=None,
        **more,
    ):
        arrays = {name: values, **more.pop("arrays", {})}
        valid = more.pop("valid", np.ones(len(values)))
        if kind in ("teacher", "masks") and valid is not None:
            arrays["valid"] = np.asarray(valid, np.uint8)
        specs = {
            name: ArraySpec(
                dtype=str(array.dtype),
                shape=array.shape,
                dimension_names=tuple(axes[: array.ndim]),
            )
            for name, array in arrays.items()
        }
        made = StoreSettings(kind=kind, arrays=specs, values=settings or {"note": "a test"})
        writer = StoreWriter.open(tmp_path / "cache", made, provenance={})
        video = more.get("video", grey_video(FRAMES, clips.height, clips.width))
        with writer.shard(shard, source=f"{shard}.tar") as out:
            for key in keys:
                out.add(
                    key,
                    arrays,
                    more.get("attributes", {"frames": len(values)}),
                    fingerprint=fingerprint_of(key, video),
                )
            out.skip("walk/0008", "too_short", "3 frames", fingerprint=fingerprint_of("walk/0008"))
            out.commit()
        return writer.path

    return write


class Shard:
    """An input shard with one clip."""

    def __init__(self, record, name):
        self.record, self.name, self.source = record, name, f"{name}.tar"

    def num_clips(self):
        return 1

    def num_bytes(self):
        return len(self.record.video)

    def records(self):
        yield self.record


@pytest.fixture
def dataset():
    """A dataset of one clip, whose frame t has the grey level 20 t."""

    def make(clips, key="walk/0007", num_frames=FRAMES, name="00000", height=None, **given):
        video = grey_video(num_frames, height or clips.height, clips.width)
        shard = Shard(ClipRecord(key=key, video=video, **given), name)
        return ClipDataset((shard,), layout="one clip")

    return make
