"""`explore` on a cache of many clips: time to the first page, later answers, memory.

    python tests/benchmarks/explore.py --write tests/benchmarks/explore.md

The cache has a masks store and a text store with whole commit records, indexes and attribute
tables, and no arrays: lists read none. One process opens it, starts the server and asks it over
HTTP as the page does, until the values of all clips are known and then. It is measured with the
attribute tables, and then without them, as for older stores: all values come from the commit
records. Files are in the page cache. Processor time is that of the whole process, client and reader
included; memory is the resident set above that of the process with everything imported.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache_schema import ArraySpec, ClipEntry, StoredArray, StoreSettings, StoreWriter
from cache_schema.attribute_building import TableBuilder
from cache_schema.attribute_table import COLUMNS
from cache_schema.checksummed_json import encode_record
from cache_schema.index_building import columns_of_records
from cache_schema.index_columns import write_archive, write_columns
from cache_schema.names import StoreLayout
from cache_schema.records import CommitRecord, StoredFile
from cache_schema.zarr_shard import chunk_path, file_bytes_range, metadata_paths

Runs = list[dict[str, dict[str, float]]]

TARGET_S = 2.0
WORDS = ("lion", "dog", "horse", "robot", "walks", "runs", "over", "grass", "sand", "snow", "by")
CUT: dict[str, Any] = {"num_frames": 49, "height": 480, "width": 720, "fps": 8.0}


def settings_of(kind: str) -> StoreSettings:
    """A store as stage one writes it at 49x480x720."""
    valid = ArraySpec(dtype="uint8", shape=(49,), dimension_names=("t",))
    mask = ArraySpec(dtype="uint8", shape=(49, 120, 180), dimension_names=("t", "h", "w"))
    embeds = ArraySpec(dtype="float16", shape=(226, 4096), dimension_names=("l", "d"))
    if kind == "text":
        return StoreSettings(kind=kind, arrays={"embeds": embeds}, values={"encoder": "t5"})
    arrays = {"forward": mask, "backward": mask, "valid": valid}
    return StoreSettings(kind=kind, arrays=arrays, values={"clips": CUT})


def attributes_of(kind: str, chance: random.Random) -> dict[str, Any]:
    """What a clip's record says, about as long as a real one."""
    if kind == "text":
        return {"caption": " ".join(chance.choices(WORDS, k=20)), "tokens_cut": 0}
    valid = 49 if chance.random() < 0.8 else chance.randrange(2, 49)
    return {
        "num_frames": 49,
        "prompt": {
            "source": "grounding",
            "kinds": ["box"],
            "frame": 0,
            "subjects": 1,
            "confidence": round(chance.uniform(0.3, 1.0), 6),
            "backward": "track",
        },
        "first_frame": 0,
        "last_frame": valid - 1,
        "lost_at": None if valid == 49 else valid,
        "valid_frames": valid,
        "quality": round(chance.betavariate(8, 2), 6),
        "geometry": {"source_height": 1080, "source_width": 1920, "source_fps": 29.97},
    }


def make_store(root: Path, kind: str, clips: int, per_shard: int) -> None:
    """Write `store.json`, the commit records and the index."""
    settings = settings_of(kind)
    layout = StoreLayout(StoreWriter.open(root, settings, provenance={}).path)
    files = {path: StoredFile(1000, "00000000") for path in metadata_paths(settings)}
    sizes = {name: file_bytes_range(spec)[0] for name, spec in settings.arrays.items()}

    def records() -> Iterator[tuple[CommitRecord, int]]:
        for first in range(0, clips, per_shard):
            shard = f"{first // per_shard:05d}"
            chance = random.Random(f"{kind} {shard}")
            entries = []
            for index in range(min(per_shard, clips - first)):
                arrays = {
                    name: StoredArray(chunk_path(name, spec, index), sizes[name], "0" * 8, "0" * 8)
                    for name, spec in settings.arrays.items()
                }
                key, fingerprint = f"{shard}/clip-{first + index:08d}", f"{first + index:032x}"
                attributes = attributes_of(kind, chance)
                entries.append(
                    ClipEntry(key, shard, index, f"{shard}.tar", fingerprint, attributes, arrays)
                )
            record = CommitRecord(shard, 0, 0, f"{shard}.tar", tuple(entries), (), files)
            data = encode_record(record.as_dict(settings.hash))
            layout.commit(shard).write_bytes(data)
            yield record, int(data[14:22], 16)

    table = TableBuilder()

    def listed() -> Iterator[tuple[CommitRecord, int]]:
        for record, crc32c in records():
            table.add(record, crc32c)
            yield record, crc32c

    columns = columns_of_records(listed(), settings.arrays)
    with layout.index.open("wb") as file:
        write_columns(file, columns, settings, 0)
    with layout.attributes.open("wb") as file:
        write_archive(file, table.columns(), COLUMNS, settings)


def resident_mb(name: str) -> float:
    """A figure of this process from /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / 1e6


def now() -> tuple[float, float]:
    """Seconds of this process's processor time, and of the clock."""
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    """Seconds since `start`, of both."""
    processor, clock = now()
    return {"processor": processor - start[0], "clock": clock - start[1]}


def measure(cache: Path) -> dict[str, dict[str, float]]:
    """Open the cache, ask the server, and return seconds of both clocks, or MB, by name."""
    from stages.clips import ClipsConfig
    from stages.explore.explorer import Explorer, Sources
    from stages.explore.leave_out import LeaveOutList
    from stages.explore.server import ExploreServer
    from stages.explore.stores import open_cache
    from stages.train_student.objectives.config import LgfConfig

    before = resident_mb("VmRSS")
    start = now()
    explorer = Explorer(
        sources=Sources(
            cache=str(cache),
            sizes=open_cache(cache),
            data=ClipsConfig(path=cache),
            dataset=None,
            no_dataset="none",
            lgf=LgfConfig(),
            leave_out=LeaveOutList(cache / "leave_out.jsonl"),
        )
    )
    server = ExploreServer(explorer)
    explorer.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path: str) -> None:
        with urllib.request.urlopen(f"{server.address}{path}") as answer:
            answer.read()

    ask("")
    ask("api/clips?limit=60")
    found = {"open, and the first page": since(start)}
    found["memory then"] = {"mb": resident_mb("VmHWM") - before}
    reading = []
    while not explorer.table.finished:
        asked = now()
        ask("api/clips?limit=60&offset=600")
        reading.append(since(asked))
        time.sleep(0.1)
    if reading:
        found["slowest page while reading"] = max(reading, key=lambda one: one["clock"])
    found["all values known"] = since(start)
    assert not explorer.table.problems, explorer.table.problems[0]
    for name, path in {
        "ordered by a column": "api/clips?limit=60&sort=quality",
        "its next page": "api/clips?limit=60&offset=60&sort=quality",
        "search for two words": "api/clips?limit=60&search=robot+snow",
        "two filters": "api/clips?limit=60&range=quality:0.2:0.4&range=lost:1:40",
        "histograms": "api/histograms",
        "histograms with two filters": "api/histograms?range=quality:0.2:0.4&range=lost:1:40",
    }.items():
        asked = now()
        ask(path)
        found[name] = since(asked)
    found["memory with everything"] = {"mb": resident_mb("VmHWM") - before}
    server.shutdown()
    return found


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--clips-per-shard", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tables-only", action="store_true", help="not without the tables")
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    report(options)


def report(options: argparse.Namespace) -> None:
    """Make the cache, measure in processes of their own, print the table."""
    import torch
    from report import finish, machine, median_and_spread, table

    with tempfile.TemporaryDirectory() as name:
        for kind in ("masks", "text"):
            make_store(Path(name), kind, options.clips, options.clips_per_shard)
        command = [sys.executable, __file__, f"--measure={name}"]

        def measured_runs() -> Runs:
            return [
                json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                for _ in range(options.repeats)
            ]

        sides = {"": measured_runs()}
        if not options.tables_only:
            for path in Path(name).glob("*/attributes.npz"):
                path.unlink()
            sides[", without the tables"] = measured_runs()

    def cell(runs: Runs, measured: str, of: str, unit: str) -> str:
        values = [run[measured][of] for run in runs if of in run.get(measured, {})]
        if not values:
            return ""
        middle, (low, high) = median_and_spread(values)
        spread = f" ({low:.3g} to {high:.3g})" if len(values) > 1 else ""
        return f"{middle:.3g} {unit}{spread}"

    columns = {"processor": "s", "clock": "s", "mb": "MB"}
    rows = [
        [name + side, *(cell(runs, name, of, unit) for of, unit in columns.items())]
        for side, runs in sides.items()
        for name in runs[0]
    ]
    runs = sides[""]
    first = [run["open, and the first page"]["processor"] for run in runs]
    middle, spread_s = median_and_spread(first)
    settings = {
        name: str(getattr(options, name)) for name in ("clips", "clips_per_shard", "repeats")
    }
    finish(
        "explore",
        table(["", "processor time", "by the clock", "memory added"], rows),
        {
            "value": round(middle, 3),
            "target": TARGET_S,
            "spread": [round(value, 3) for value in spread_s],
            "mb": round(max(run["memory with everything"]["mb"] for run in runs)),
            "machine": machine(torch.device("cpu")),
            "settings": settings,
        },
        options.write,
    )


if __name__ == "__main__":
    main()
