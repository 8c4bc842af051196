"""A teacher without errors: which pieces of which limbs each token shows, taken from the drawing.

What such a teacher cannot teach, no tracker can. Limbs are cut into pieces of `PIECE` pixels along
their axis, and a token's feature counts the pixels of each piece, so that tokens are alike as far
as they show the same pieces. Both directions of time have the same features.
"""

# Legend: T frame, H W token grid, N pixel, G channel, 2 x and y.

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cache_schema import ShardWriter, StoreReader, StoreWriter
from cache_schema.atomic_io import FileLock
from stages.demo.figures import BODY_PLANS
from stages.demo.scenes import FigureClip
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.video_scores.limb_labels import label_limbs
from tests.benchmarks.evidence.data import draw_faster_clip
from tests.benchmarks.evidence.sizes import Size

PIECE = 8
"""Length of a piece, pixels."""
CHANNELS = 128
"""Channel 0 is all that is no limb; the pieces of a figure follow, the rest stays 0."""
_SCENERY_WEIGHT = 0.1
"""A pixel that shows no limb counts less: a limb is half a token wide."""


def limb_features(clip: FigureClip, token_grid: tuple[int, int]) -> Tensor:
    """The features of a clip: unit norm, float32 [T, H, W, CHANNELS].

    Args:
        clip: With its joints; limbs are where they are seen, not where something hides them.
        token_grid: Rows and columns; tokens are squares.
    """
    labels_THW = label_limbs(clip.frames_THWC, BODY_PLANS[clip.kind])
    num_frames, height, width = labels_THW.shape
    patch = height // token_grid[0]
    if (height, width) != (token_grid[0] * patch, token_grid[1] * patch):
        raise ValueError(f"{height}x{width} pixels are not {token_grid} square tokens")
    counts_THWG = np.zeros((num_frames, *token_grid, CHANNELS))
    t, y, x = np.nonzero(labels_THW < 0)
    np.add.at(counts_THWG, (t, y // patch, x // patch, np.zeros_like(t)), _SCENERY_WEIGHT)
    names = list(clip.joint_names)
    first = 1
    for number, limb in enumerate(clip.limbs):
        t, y, x = np.nonzero(labels_THW == number)
        start_N2, end_N2 = (clip.joints_TJ2[t, names.index(one)] for one in (limb.start, limb.end))
        axis_N2, offset_N2 = end_N2 - start_N2, np.stack([x, y], axis=1) + 0.5 - start_N2
        square_N = np.maximum((axis_N2**2).sum(1), 1e-9)
        pieces = math.ceil(limb.length * clip.size / PIECE)
        place_N = pieces * np.clip((axis_N2 * offset_N2).sum(1) / square_N, 0, 1)
        # A pixel counts for the two nearest ends of pieces, so that nothing jumps.
        low_N = np.minimum(place_N.astype(int), pieces - 1)
        for channel_N, weight_N in ((low_N, low_N + 1 - place_N), (low_N + 1, place_N - low_N)):
            np.add.at(counts_THWG, (t, y // patch, x // patch, first + channel_N), weight_N)
        first += pieces + 1
    if first > CHANNELS:
        raise ValueError(f"a figure of {first} pieces; at most {CHANNELS} are supported")
    features_THWG = torch.from_numpy(counts_THWG).float()
    return normalize(features_THWG, dim=-1)


def write_limb_features(teacher: Path, size: Size) -> Path:
    """Write the store that a tracker without errors would have written beside a teacher's store.

    Clips, shards, valid maps and records are those of that store; existing shards are kept.

    Args:
        teacher: A teacher store of drawn clips, in float16, one map per frame.
        size: The lengths that the clips were drawn with.

    Returns:
        The folder of the store.
    """
    reader = StoreReader(teacher, kind="teacher")
    maps, height, width, _ = reader.settings.arrays["features"].shape
    arrays = feature_arrays_spec((maps, height, width, CHANNELS), "float16")
    settings = replace(
        reader.settings,
        arrays=arrays | {"valid": reader.settings.arrays["valid"]},
        values={**reader.settings.values, "features": "limbs", "fusion": "average", "parts": 1},
    )
    with FileLock(teacher.parent / ".limbs.lock", wait=True, what="the store of limbs"):
        writer = StoreWriter.open(teacher.parent, settings, provenance=reader.provenance)
        for name, facts in reader.shards.items():
            if not writer.is_committed(name):
                _write_shard(writer.shard(name, source=facts.source), reader, size)
    return writer.path


def _write_shard(shard: ShardWriter, reader: StoreReader, size: Size) -> None:
    _, height, width, _ = reader.settings.arrays["features"].shape
    with shard:
        for key in reader.keys:
            record = reader.record(key)
            if record.shard != shard.name or shard.has(key):
                continue
            clip = draw_faster_clip(int(key.rpartition("-")[2]), size)
            made = encode_features(limb_features(clip, (height, width)), "float16")
            made["valid"] = reader.read(key)["valid"]
            shard.add(key, made, record.attributes, fingerprint=record.fingerprint)
        shard.commit()
