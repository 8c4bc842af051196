"""What extraction spends on comparing a dataset with its cache.

    python tests/benchmarks/compare_dataset.py --write tests/benchmarks/compare_dataset.md

First the reading of a dataset (captions, and three samples of each video), per clip: a folder with
`metadata.jsonl`, and tars, both in the page cache. Then the comparison of a million clips with
three stores by their indexes, of which a thousandth lack clips and a thousandth have others.
Memory is what the resident set grows by at most.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from cache_schema import SortedText, StoreReader
from stages.clips import ClipsConfig, open_dataset
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.execution.comparison import compare
from stages.extract_features.fingerprints import DatasetSources, read_sources
from stages.progress import SilentProgress
from tests.benchmarks.open_index import KINDS, make_store, measured
from tests.benchmarks.report import finish, machine, table

VIDEO_BYTES = 300_000
CLIPS_PER_SHARD = 1000


def write_folder(folder: Path, num_clips: int) -> Path:
    """Files that are no videos, which nothing here decodes."""
    folder.mkdir()
    rows = []
    for number in range(num_clips):
        name = f"clip-{number:08d}.mp4"
        (folder / name).write_bytes(os.urandom(VIDEO_BYTES))
        rows.append(json.dumps({"file_name": name, "caption": f"take {number} of a walk"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def write_tars(folder: Path, num_clips: int) -> Path:
    """The same as webdataset tars."""
    folder.mkdir()
    for first in range(0, num_clips, CLIPS_PER_SHARD):
        with tarfile.open(folder / f"{first // CLIPS_PER_SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + CLIPS_PER_SHARD, num_clips)):
                caption = f"take {number} of a walk".encode()
                for suffix, content in (("mp4", os.urandom(VIDEO_BYTES)), ("txt", caption)):
                    member = tarfile.TarInfo(f"clip-{number:08d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def seconds_per_clip(path: Path, num_clips: int) -> float:
    """Wall-clock time of reading a dataset's fingerprints, over its clips."""
    dataset = open_dataset(ClipsConfig(path=path))
    config = ExtractConfig(kinds=("text", "latents", "teacher"))
    started = time.perf_counter()
    found = read_sources(dataset.shards, config.kinds, config.teacher, SilentProgress())
    assert len(found.keys) == num_clips
    return (time.perf_counter() - started) / num_clips


def sources_of(reader: StoreReader, num_clips: int) -> DatasetSources:
    """A dataset of which the store lacks a thousandth and made a thousandth of something else."""
    numbers = range(num_clips)
    keys = [f"{n // CLIPS_PER_SHARD:05d}/clip-{n:08d}".encode() for n in numbers]
    fingerprints = np.array([b"%032x" % n for n in numbers], "S32")
    fingerprints[::1000] = b"f" * 32
    return DatasetSources(
        keys=SortedText.from_utf8(keys),
        shard_names=tuple(reader.shards),
        shard_N=np.arange(num_clips, dtype=np.uint32) // CLIPS_PER_SHARD,
        fingerprints=dict.fromkeys(("text", "latents", "teacher"), fingerprints),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=4_000)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = seconds_per_clip(write_folder(root / "folder", arguments.files), arguments.files)
        tars = seconds_per_clip(write_tars(root / "tars", arguments.files), arguments.files)
        stores: dict[Kind, Path] = {
            kind: make_store(root, kind, range(arguments.clips), CLIPS_PER_SHARD, indexed=True)
            for kind in get_args(Kind)
            if kind in KINDS
        }
        sources = sources_of(StoreReader(stores["text"]), arguments.clips)
        found = measured(
            lambda: compare([(kind, StoreReader(path)) for kind, path in stores.items()], sources)
        )
    text = table(
        ["", "time", "memory added"],
        [
            ["read one clip of a folder", f"{folder * 1e6:.0f} µs", ""],
            ["read one clip of a tar", f"{tars * 1e6:.0f} µs", ""],
            ["compare with three stores", f"{found['seconds']:.2f} s", f"{found['mb']:.0f} MB"],
        ],
    )
    summary = {
        "value": round(found["seconds"], 3),
        "target": 20.0,
        "spread": [round(found["seconds"], 3)] * 2,
        "mb": round(found["mb"]),
        "read_us": [round(folder * 1e6), round(tars * 1e6)],
        "machine": machine(torch.device("cpu")),
        "settings": {"clips": arguments.clips, "files": arguments.files},
    }
    finish("compare_dataset", text, summary, arguments.write)


if __name__ == "__main__":
    main()
