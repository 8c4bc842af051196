"""A small cache of four clips: masks, features of both tracks, captions; and a dataset of one."""

import threading
from pathlib import Path

import numpy as np
import pytest

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.clips import ClipDataset, ClipRecord, ClipsConfig, encode_video
from stages.explore.explorer import Explorer, Sources
from stages.explore.leave_out import LeaveOutList
from stages.explore.stores import open_cache
from stages.train_student.objectives.config import LgfConfig
from tests.fingerprints import fingerprint_of

FRAMES, GRID, CHANNELS = 9, (3, 4), 6
LEVELS = 20 * np.arange(FRAMES, dtype=np.uint8)
VIDEO = encode_video(np.broadcast_to(LEVELS[:, None, None, None], (FRAMES, 48, 64, 3)), 8.0)
"""Frame t has the grey level 20 t."""
CUT = {"num_frames": FRAMES, "height": 48, "width": 64, "fps": 8.0}
HTML = "</script><img src=x onerror=\"document.title='broken in'\"> <b>bold</b>"
CAPTIONS = {
    "walk/0001": "A Lion walks.",
    "walk/0002": HTML,
    "run/<i>3": "Ein LÖWE rennt.",
    "run/0004": "A dog runs.",
}
QUALITY = {"walk/0001": 0.9, "walk/0002": 0.25, "run/<i>3": None, "run/0004": 0.5}
LOST = {"walk/0001": 0, "walk/0002": 4, "run/<i>3": 1, "run/0004": 0}
ROWS = sorted(CAPTIONS)


def attributes(key):
    automatic = QUALITY[key] is None
    return {
        "num_frames": FRAMES,
        "prompt": {
            "source": "grounding" if automatic else "dataset",
            "kinds": ["box" if automatic else "mask"],
            "frame": 0,
            "confidence": 0.75 if automatic else None,
            "backward": "track",
        },
        "quality": QUALITY[key],
        "valid_frames": FRAMES - LOST[key],
        "lost_at": FRAMES - LOST[key] if LOST[key] else None,
    }


def features_of(key, part):
    """Unit tokens of one track: float32 [T, H, W, C / 2]."""
    seed = [*key.encode(), part]
    tokens = np.random.default_rng(seed).standard_normal((FRAMES, *GRID, CHANNELS // 2))
    return (tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)).astype(np.float32)


def masks_of(key):
    """A block that moves to the right: uint8 [T, 12, 16]."""
    mask_Thw = np.zeros((FRAMES, 12, 16), np.uint8)
    for t in range(FRAMES):
        mask_Thw[t, 4:8, t : t + 4] = 200 + ROWS.index(key)
    return mask_Thw


def write_store(
    root, kind, arrays_of, values, attributes_of=attributes, *, skipped=(), video=VIDEO
):
    """Write the clips as one store of two shards."""
    some = arrays_of(ROWS[0])
    specs = {
        name: ArraySpec(
            dtype=str(array.dtype),
            shape=array.shape,
            dimension_names=tuple("thwc"[: array.ndim]),
        )
        for name, array in some.items()
    }
    settings = StoreSettings(kind=kind, arrays=specs, values=values)
    writer = StoreWriter.open(root, settings, provenance={"sam2videox": "0.1.0"})
    for name in ("run", "walk"):
        with writer.shard(name, source=f"{name}.tar") as shard:
            for key in (key for key in CAPTIONS if key.startswith(name)):
                fingerprint = fingerprint_of(key, video)
                shard.add(key, arrays_of(key), attributes_of(key), fingerprint=fingerprint)
            for key in (key for key in skipped if key.startswith(name)):
                shard.skip(key, "too_short", "3 <frames>", fingerprint=fingerprint_of(key))
            shard.commit()
    writer.write_index()
    return writer.path


def make_cache(root: Path) -> Path:
    valid = np.array([1] * 7 + [0] * 2, np.uint8)
    write_store(
        root,
        "masks",
        lambda key: {
            "forward": masks_of(key),
            "backward": np.roll(masks_of(key), 1, axis=2),
            "valid": valid,
        },
        {"clips": CUT},
        skipped=["walk/0009"],
    )
    write_store(
        root,
        "teacher",
        lambda key: {
            "features": np.concatenate(
                [0.5**0.5 * features_of(key, part) for part in (0, 1)], axis=-1
            ).astype(np.float16),
            "valid": valid,
        },
        {
            "clips": CUT,
            "fusion": "gram_flow",
            "parts": 2,
            "forward_weight": 0.5,
            "grid_source": "student",
        },
        skipped=["walk/0009"],
    )
    write_store(
        root,
        "text",
        lambda key: {"embeds": np.ones((2, 3), np.float16)},
        {"encoder": "a test"},
        lambda key: {"caption": CAPTIONS[key], "tokens_cut": 0},
    )
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("explore") / "cache")


class Shard:
    """An input shard with one clip."""

    name, source = "walk", "walk.tar"

    def records(self):
        yield ClipRecord(key="walk/0001", video=VIDEO)


def open_explorer(root, folder, *, dataset=True, read=True, **lgf):
    """Open a cache; the list of clips to leave out is in `folder`."""
    explorer = Explorer(
        sources=Sources(
            cache=str(root),
            sizes=open_cache(root),
            data=ClipsConfig(path=folder / "clips", num_frames=FRAMES, height=48, width=64),
            dataset=ClipDataset((Shard(),), layout="one clip") if dataset else None,
            no_dataset="" if dataset else "none",
            lgf=LgfConfig(**{"radius": 1} | lgf),
            leave_out=LeaveOutList(folder / "lists" / "leave_out.jsonl"),
        )
    )
    if read:
        explorer.table.read(threading.Event())
    return explorer
