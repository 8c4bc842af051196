"""Datasets, stores and runs of any size for `scale.py`; each is made once.

Fixtures are made up. Tars hold 1,000 clips of two members of a few bytes; all tars are links to
one. A metadata folder's videos are links to one. Stores have shards of 1,000 clips with tiny
arrays: the package's writer makes the first shard, and the others are links to its files and
commit records with other keys, so that every clip costs as many files as in a real store, and its
arrays nearly no bytes. Above `--groups-up-to` clips only the first two shards have all files, and
the others those of every clip that is dropped, which is all that opening, listing, indexing and
dropping touch.
"""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from cache_schema.shard_writer import ShardWriter
from tests.fingerprints import fingerprint_of

PER_SHARD = 1000
DROPPED = 1000
SMALL = (9, 32, 48)
"""Frames, height and width of the clips that training reads; the fewest and smallest there are."""

KINDS: dict[Any, dict[str, str]] = {
    "text": {"embeds": "ld"},
    "latents": {"mean": "fchw", "std": "fchw"},
    "teacher": {"features": "thwc", "valid": "t"},
    "masks": {"forward": "thw", "backward": "thw", "valid": "t"},
}
"""The stores of stage one by default; each array by its axes."""

Found = dict[str, Any]


def settings_of(kind: str, name: str = "") -> StoreSettings:
    """A store of a kind with tiny arrays; `name` sets it apart from others."""
    arrays = {
        array: ArraySpec(dtype="uint8", shape=(1,) * len(axes), dimension_names=tuple(axes))
        for array, axes in KINDS[kind].items()
    }
    return StoreSettings(kind=kind, arrays=arrays, values={"name": name})


def write_shard(writer: StoreWriter, shard: str, clips: range, skipped: range) -> None:
    """By the package's own writer."""
    with writer.shard(shard, source=f"{shard}.tar") as out:
        for number in clips:
            write_clip(out, writer.settings, number)
        for number in skipped:
            out.skip(key_of(number), "too_short", "has 12 frames", fingerprint=fingerprint_of("a"))
        out.commit()


def write_clip(out: ShardWriter, settings: StoreSettings, number: int) -> None:
    """A clip of zeros."""
    zeros = {name: np.zeros(spec.shape, spec.dtype) for name, spec in settings.arrays.items()}
    out.add(key_of(number), zeros, {"num_frames": 49}, fingerprint=fingerprint_of("a"))


def key_of(number: int) -> str:
    """Of a clip."""
    return f"{number // PER_SHARD:05d}/clip-{number:08d}"


def copy_links(source: Path, target: Path) -> None:
    """A tree of hard links: new files and folders, no new bytes."""
    subprocess.run(["cp", "-al", source, target], check=True)


def make_store(
    folder: Path, num_clips: int, groups: int, settings: StoreSettings, *, skipped: bool = False
) -> Path:
    """A store with its index.

    Args:
        folder: the cache's.
        num_clips: in shards of 1,000.
        groups: as for `repeat_shard`.
        settings: of the store.
        skipped: whether the clips are skipped ones, and the store holds one clip a shard.
    """
    one_shard = folder.parent / f"one-shard-{settings.hash}{'-skipped' if skipped else ''}"
    if not one_shard.exists():
        making = one_shard.with_suffix(".partial")
        shutil.rmtree(making, ignore_errors=True)
        clips, out = (range(1), range(1, PER_SHARD)) if skipped else (range(PER_SHARD), range(0))
        write_shard(StoreWriter.open(making, settings, provenance={}), "00000", clips, out)
        making.rename(one_shard)
    folder.mkdir(parents=True, exist_ok=True)
    (store,) = one_shard.iterdir()
    copy_links(store, folder / store.name)
    writer = StoreWriter.open(folder, settings, provenance={})
    repeat_shard(
        writer, num_clips // PER_SHARD, groups, lambda number, i: key_of(number * PER_SHARD + i)
    )
    StoreWriter(writer.path, settings).write_index()
    return writer.path


def make_trainable(folder: Path, num_clips: int, groups: int) -> None:
    """What training reads: stores of small clips, each of `SMALL`."""
    for kind, arrays in trainable_arrays().items():
        settings = StoreSettings(kind=kind, arrays=arrays, values={})
        make_store(folder, num_clips, groups, settings)


def trainable_arrays() -> dict[str, dict[str, ArraySpec]]:
    """By kind, for clips of `SMALL`."""
    from stages.local_gram_flow.alignment import TEMPORAL_COMPRESSION
    from stages.teacher_store.gram_flow import flow_arrays_spec

    frames, height, width = SMALL
    latents = ArraySpec(
        dtype="float16",
        shape=((frames - 1) // TEMPORAL_COMPRESSION + 1, 16, height // 8, width // 8),
        dimension_names=("f", "c", "h", "w"),
    )
    text = ArraySpec(dtype="float16", shape=(4, 8), dimension_names=("l", "d"))
    valid = ArraySpec(dtype="uint8", shape=(frames,), dimension_names=("t",))
    flow = flow_arrays_spec(frames - 1, height // 16, width // 16, 1, "float16")
    return {
        "text": {"embeds": text},
        "latents": {"mean": latents, "std": latents},
        "gram_flow": flow | {"valid": valid},
    }


def repeat_shard(
    writer: StoreWriter, num_shards: int, groups: int, key: Callable[[int, int], str]
) -> None:
    """Finish further shards like the first.

    Args:
        writer: of a store with one shard.
        num_shards: that there are afterwards.
        groups: how many of them have the files of their clips; the others have those of the clips
            that `drop_spread` takes, or none where it is 1.
        key: of a clip, by the numbers of its shard and in it; skipped ones count after the others.
    """
    from cache_schema.checksummed_json import encode_record
    from cache_schema.names import StoreLayout
    from cache_schema.records import read_commit

    layout = StoreLayout(writer.path)
    first = read_commit(layout, writer.settings, "00000")
    for number in range(1, num_shards):
        name = f"{number:05d}"
        record = replace(
            first,
            shard=name,
            source=f"{name}.tar",
            clips=tuple(
                replace(c, key=key(number, i), shard=name) for i, c in enumerate(first.clips)
            ),
            skipped=tuple(
                replace(c, key=key(number, i), shard=name)
                for i, c in enumerate(first.skipped, start=len(first.clips))
            ),
        )
        if number < groups:
            copy_links(layout.group("00000", 0), layout.group(name, 0))
        elif groups > 1:
            dropped = first.clips[:: max(1, num_shards * PER_SHARD // DROPPED)]
            of_clips = (stored.path for clip in dropped for stored in clip.arrays.values())
            for path in (*first.files, *of_clips):
                link = layout.group(name, 0) / path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.hardlink_to(layout.group("00000", 0) / path)
        layout.commit(name).write_bytes(encode_record(record.as_dict(writer.settings.hash)))


def store_of(folder: Path) -> Path:
    """The one store of a cache."""
    return next(folder.glob("*/store.json")).parent


def make_tars(folder: Path, num_clips: int) -> None:
    """Webdataset tars; keys begin with the tar's name, so that equal tars have other clips."""
    import io
    import tarfile

    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(PER_SHARD):
            for suffix, content in (("mp4", b"no video"), ("txt", b"a walk")):
                member = tarfile.TarInfo(f"clip-{number:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for number in range(1, num_clips // PER_SHARD):
        os.link(folder / "00000.tar", folder / f"{number:05d}.tar")


def make_begun(folder: Path, num_clips: int) -> None:
    """Tars, and a cache: of text all of them but one more are finished, of other kinds one is."""
    from stages.clips import ClipRecord, ClipsConfig, open_dataset
    from stages.clips.fingerprints import hash_video
    from stages.extract_features.config import TeacherConfig
    from stages.extract_features.fingerprints import fingerprint_of

    make_tars(folder / "tars", num_clips + PER_SHARD)
    first, *_ = open_dataset(ClipsConfig(path=folder / "tars")).shards
    for kind in KINDS:
        settings = settings_of(kind)
        writer = StoreWriter.open(folder / "cache", settings, provenance={})
        zeros = {name: np.zeros(spec.shape, "u1") for name, spec in settings.arrays.items()}
        with writer.shard("00000", source="00000.tar") as out:
            for record in first.records():
                assert isinstance(record, ClipRecord)
                video = hash_video(record.video)
                fingerprint = fingerprint_of(record, kind, TeacherConfig(), video)
                out.add(record.key, zeros, {"num_frames": 49}, fingerprint=fingerprint)
            out.commit()
        num_shards = num_clips // PER_SHARD if kind == "text" else 1
        repeat_shard(writer, num_shards, 1, lambda n, i: f"{n:05d}/clip-{i:08d}")
        StoreWriter(writer.path, settings).write_index()


def make_metadata(folder: Path, num_clips: int) -> None:
    """A folder with metadata.jsonl."""
    most_links = 30_000
    with _opened(folder / "metadata.jsonl") as file:
        for number in range(num_clips):
            name = f"{number // PER_SHARD:05d}/clip-{number:08d}.mp4"
            if number % PER_SHARD == 0:
                (folder / name).parent.mkdir()
            if number % most_links == 0:
                linked = folder / name
                linked.write_bytes(b"no video")
            else:
                os.link(linked, folder / name)
            file.write(json.dumps({"file_name": name, "caption": f"take {number} of a walk"}))
            file.write("\n")


def make_run(folder: Path, num_steps: int) -> None:
    """The folder of a training run with an auxiliary objective."""
    chance = random.Random(0)
    with _opened(folder / "losses.jsonl") as losses, _opened(folder / "performance.jsonl") as speed:
        for step in range(1, num_steps + 1):
            loss = 0.1 + chance.random() / 100
            row: Found = {
                "step": step,
                "loss": loss,
                "diffusion": loss,
                "auxiliary": {"lgf": loss / 2},
                "grad_norm": chance.random(),
                "lr": 1e-4,
                "by_timestep": {
                    "count": [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
                    "diffusion": [loss, loss, loss, loss, *[None] * 6],
                    "lgf": [loss, loss, loss, loss, *[None] * 6],
                },
            }
            losses.write(json.dumps(row) + "\n")
            row = {
                "step": step,
                "seconds": 1 + chance.random() / 10,
                "wait_seconds": chance.random() / 100,
                "clips_per_second": 4.0,
                "peak_memory_bytes": 60_000_000_000,
                "share_of_peak": 0.4,
            }
            speed.write(json.dumps(row) + "\n")
    (folder / "run.json").write_text("{}", encoding="utf-8")


@contextmanager
def _opened(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield file


FIXTURES: dict[str, Callable[[Path, int, int], object]] = {
    "tars": lambda folder, size, _: make_tars(folder, size),
    "begun": lambda folder, size, _: make_begun(folder, size),
    "metadata": lambda folder, size, _: make_metadata(folder, size),
    "store": lambda folder, size, groups: make_store(folder, size, groups, settings_of("teacher")),
    "skipped": lambda folder, size, _: make_store(
        folder, size, 1, settings_of("teacher"), skipped=True
    ),
    "trainable": make_trainable,
    "run": lambda folder, size, _: make_run(folder, size),
    "nothing": lambda folder, *_: folder.mkdir(),
}
