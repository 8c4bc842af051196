"""Opening stores of a million clips: time, memory, look-ups, and three of them joined by key.

    python tests/benchmarks/open_index.py --write tests/benchmarks/open_index.md

The stores have no arrays, which opening never touches, and of their commit records the first bytes,
which it compares with the index; each lacks a thousandth of the clips, and not the same ones. The
other side is a smaller store without `index.npz`, whose commit records are whole and all read.

Each figure comes from a process of its own that has imported the package. Time is the processor's,
with the files in the page cache, so that other work on the machine does not count; memory is what
the resident set grows by at most.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cache_schema import ArraySpec, ClipEntry, StoredArray, StoreReader, StoreSettings, StoreWriter
from cache_schema.checksummed_json import encode_record
from cache_schema.index_building import columns_of_records
from cache_schema.index_columns import write_columns
from cache_schema.names import StoreLayout
from cache_schema.records import CommitRecord, StoredFile
from cache_schema.zarr_shard import chunk_path, metadata_paths

TARGET_S = 2.0
KINDS = {"latents": ("latents",), "teacher": ("features", "valid"), "text": ("embeddings", "mask")}
LOOKUPS = 20_000


def make_store(root: Path, kind: str, clips: range, per_shard: int, *, indexed: bool) -> Path:
    """Write `store.json` and what there is beside it: an index, or whole commit records."""
    spec = ArraySpec(dtype="float16", shape=(49, 30, 45, 512), dimension_names=("t", "h", "w", "c"))
    settings = StoreSettings(kind=kind, arrays=dict.fromkeys(KINDS[kind], spec), values={})
    layout = StoreLayout(StoreWriter.open(root, settings, provenance={}).path)
    lacking = list(KINDS).index(kind)

    def records() -> Iterator[tuple[CommitRecord, int]]:
        for first in clips[::per_shard]:
            numbers = range(first, min(first + per_shard, clips.stop))
            present = [number for number in numbers if number % 1000 != lacking]
            record = make_record(settings, f"{first // per_shard:05d}", present)
            data = b'{\n "crc32c": "%08x' % first
            if not indexed:
                data = encode_record(record.as_dict(settings.hash))
            layout.commit(record.shard).write_bytes(data)
            yield record, first

    if indexed:
        with layout.index.open("wb") as file:
            write_columns(file, columns_of_records(records(), settings.arrays), settings, 0)
    else:
        for _ in records():
            pass
    return layout.root


def make_record(settings: StoreSettings, shard: str, numbers: Sequence[int]) -> CommitRecord:
    """A finished shard of these clips."""
    chance = random.Random(shard)
    attributes: dict[str, Any] = {
        "num_frames": 49,
        "source_fps": 29.97,
        "prompt": "mask",
        "quality": 0.97,
    }
    clips = []
    for index, number in enumerate(numbers):
        arrays = {
            name: StoredArray(
                chunk_path(name, spec, index),
                67_738_780,
                f"{chance.getrandbits(32):08x}",
                f"{chance.getrandbits(32):08x}",
            )
            for name, spec in settings.arrays.items()
        }
        key = f"{shard}/clip-{number:08d}"
        clips.append(
            ClipEntry(key, shard, index, f"{shard}.tar", f"{number:032x}", attributes, arrays)
        )
    files = {path: StoredFile(1000, "00000000") for path in metadata_paths(settings)}
    return CommitRecord(shard, 0, 0, f"{shard}.tar", tuple(clips), (), files)


def resident_mb(name: str, *, of: str = "status") -> float:
    """A figure of this process from /proc/self, in MB."""
    for line in Path(f"/proc/self/{of}").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/{of} has no {name}")


def measured(action: Callable[[], object]) -> dict[str, float]:
    """Seconds of an action, and MB by which it made this process grow at most."""
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = time.process_time()
    kept = action()
    seconds = time.process_time() - start
    del kept
    return {"seconds": seconds, "mb": resident_mb("VmHWM") - before}


def opened(path: str) -> StoreReader:
    """A reader that has looked."""
    reader = StoreReader(Path(path))
    assert len(reader)
    return reader


def measure_join(paths: Sequence[str]) -> dict[str, float]:
    """Open stores and find the keys that are in all of them."""

    def join() -> object:
        readers = [opened(path) for path in paths]
        keys = readers[0].keys.in_all(*(reader.keys for reader in readers[1:]))
        print(len(keys), file=sys.stderr)
        return readers, keys

    return measured(join)


def measure_lookups(path: str) -> dict[str, float]:
    """Seconds of a look-up by key: whether it is there, and where and how large its file is."""
    reader = opened(path)
    chance = random.Random(0)
    keys = [reader.keys[chance.randrange(len(reader))] for _ in range(LOOKUPS)]
    start = time.process_time()
    for key in keys:
        assert key in reader
        assert reader.shard_of(key)
    return {"seconds": (time.process_time() - start) / LOOKUPS}


def measure_worker(path: str) -> dict[str, float]:
    """MB that a forked process adds to its parent's by looking at every key."""
    reader = opened(path)
    receive, send = os.pipe()
    if os.fork() == 0:
        before = resident_mb("Private_Dirty", of="smaps_rollup")
        assert all(key in reader for key in reader.keys)
        grown = resident_mb("Private_Dirty", of="smaps_rollup") - before
        os.write(send, json.dumps({"mb": grown}).encode())
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as file:  # noqa: PTH123 (a descriptor)
        found: dict[str, float] = json.loads(file.read())
    os.wait()
    return found


MEASURES: dict[str, Callable[[Sequence[str]], dict[str, float]]] = {
    "open": lambda paths: measured(lambda: opened(paths[0])),
    "join": measure_join,
    "look up": lambda paths: measure_lookups(paths[0]),
    "worker": lambda paths: measure_worker(paths[0]),
}


def in_process(measure: str, *stores: Path) -> dict[str, float]:
    """Run a measurement in a new process."""
    command = [sys.executable, __file__, f"--measure={measure}", *map(str, stores)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--clips-per-shard", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("stores", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.stores)))
        return
    report(options)


def report(options: argparse.Namespace) -> None:
    """Make the stores, measure each side in turn, print the table."""
    import torch
    from report import finish, machine, median_and_spread, table

    def cell(runs: Sequence[dict[str, float]], unit: str, words: str, scale: float = 1) -> str:
        values = [run[unit] * scale for run in runs if unit in run]
        if not values:
            return ""
        middle, (low, high) = median_and_spread(values)
        return f"{middle:.3g} {words} ({low:.3g} to {high:.3g})"

    with tempfile.TemporaryDirectory() as name:
        clips, per_shard = range(options.clips), options.clips_per_shard
        stores = [make_store(Path(name), kind, clips, per_shard, indexed=True) for kind in KINDS]
        few = clips[: options.clips // 20]
        bare = make_store(Path(name) / "bare", "teacher", few, per_shard, indexed=False)
        index_mb = (stores[1] / "index.npz").stat().st_size / 1e6
        runs = [
            {
                "open": in_process("open", stores[1]),
                "join": in_process("join", *stores),
                "look up": in_process("look up", stores[1]),
                "worker": in_process("worker", stores[1]),
            }
            for _ in range(options.repeats)
        ]
        bare_run = [in_process("open", bare)]
    found = {name: [run[name] for run in runs] for name in runs[0]}
    rows = [
        [
            f"open a store by index.npz ({index_mb:.0f} MB)",
            cell(found["open"], "seconds", "s"),
            cell(found["open"], "mb", "MB"),
        ],
        [
            f"open {len(few)} clips by their records",
            cell(bare_run, "seconds", "s"),
            cell(bare_run, "mb", "MB"),
        ],
        [
            "open three stores and join them",
            cell(found["join"], "seconds", "s"),
            cell(found["join"], "mb", "MB"),
        ],
        ["look up one key", cell(found["look up"], "seconds", "µs", 1e6), ""],
        ["a forked worker that looks up every key", "", cell(found["worker"], "mb", "MB")],
    ]
    middle, spread = median_and_spread([run["seconds"] for run in found["open"]])
    settings = {
        name: str(getattr(options, name)) for name in ("clips", "clips_per_shard", "repeats")
    }
    finish(
        "open_index",
        table(["", "processor time", "memory added"], rows),
        {
            "value": round(middle, 3),
            "target": TARGET_S,
            "spread": [round(value, 3) for value in spread],
            "mb": round(max(run["mb"] for run in found["open"])),
            "machine": machine(torch.device("cpu")),
            "settings": settings,
        },
        options.write,
    )


if __name__ == "__main__":
    main()
