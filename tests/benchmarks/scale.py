"""What one process spends as clips grow from a thousand to a million: time, memory, files.

    python tests/benchmarks/scale.py --label "main, 2026-11-26" --folder DIR \
        --write tests/benchmarks/scale.md

Each cell is a process of its own with a limit in time; memory is the most that process had
resident, imports included ("a process that imports stage one" has as much without any clip), and
seconds are by the clock, and in parentheses the processor's. Seconds do not include imports.
Results are appended to DIR/results.jsonl as they come: a benchmark that was stopped goes on. Where
a size passes the limit, larger ones are not tried.

Fixtures are made up. Tars hold 1,000 clips of two members of a few bytes; all tars are links to
one. A metadata folder's videos are links to one. Stores have shards of 1,000 clips with tiny
arrays: the package's writer makes the first shard, and the others are links to its files and
commit records with other keys, so that every clip costs as many files as in a real store, and its
arrays nearly no bytes. Above `--groups-up-to` clips only the first two shards have all files, and
the others those of every clip that is dropped, which is all that opening, listing, indexing and
dropping touch.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

import numpy as np

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter, verify_store
from tests.fingerprints import fingerprint_of

PER_SHARD = 1000
SIZES = (1_000, 10_000, 100_000, 1_000_000)
DROPPED = 1000

KINDS = {
    "text": {"embeds": "ld"},
    "latents": {"mean": "fchw", "std": "fchw"},
    "teacher": {"features": "thwc", "valid": "t"},
    "masks": {"forward": "thw", "backward": "thw", "valid": "t"},
}
"""The stores of stage one by default; each array by its axes."""

Found = dict[str, Any]


# Fixtures: each is made once under the benchmark's folder.


def settings_of(kind: str, name: str = "") -> StoreSettings:
    """A store of a kind with tiny arrays; `name` sets it apart from others."""
    arrays = {
        array: ArraySpec(dtype="uint8", shape=(1,) * len(axes), dimension_names=tuple(axes))
        for array, axes in KINDS[kind].items()
    }
    return StoreSettings(kind=kind, arrays=arrays, values={"name": name})


def write_shard(writer: StoreWriter, shard: str, clips: range, skipped: range) -> None:
    """By the package's own writer."""
    zeros = {name: np.zeros(spec.shape, "u1") for name, spec in writer.settings.arrays.items()}
    with writer.shard(shard, source=f"{shard}.tar") as out:
        for number in clips:
            out.add(key_of(number), zeros, {"num_frames": 49}, fingerprint=fingerprint_of("a"))
        for number in skipped:
            out.skip(key_of(number), "too_short", "has 12 frames", fingerprint=fingerprint_of("a"))
        out.commit()


def key_of(number: int) -> str:
    """Of a clip."""
    return f"{number // PER_SHARD:05d}/clip-{number:08d}"


def copy_links(source: Path, target: Path) -> None:
    """A tree of hard links: new files and folders, no new bytes."""
    subprocess.run(["cp", "-al", source, target], check=True)


def make_store(folder: Path, num_clips: int, groups: int, *, skipped: bool = False) -> Path:
    """A teacher store without an index.

    Args:
        folder: the cache's.
        num_clips: in shards of 1,000.
        groups: as for `repeat_shard`.
        skipped: whether the clips are skipped ones, and the store holds one clip a shard.
    """
    one_shard = folder.parent / ("one-shard-skipped" if skipped else "one-shard")
    if not one_shard.exists():
        making = one_shard.with_suffix(".partial")
        shutil.rmtree(making, ignore_errors=True)
        clips, out = (range(1), range(1, PER_SHARD)) if skipped else (range(PER_SHARD), range(0))
        writer = StoreWriter.open(making, settings_of("teacher"), provenance={})
        write_shard(writer, "00000", clips, out)
        making.rename(one_shard)
    copy_links(one_shard, folder)
    writer = StoreWriter.open(folder, settings_of("teacher"), provenance={})
    repeat_shard(
        writer, num_clips // PER_SHARD, groups, lambda number, i: key_of(number * PER_SHARD + i)
    )
    return writer.path


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


def make_indexed(folder: Path, num_clips: int, groups: int, *, skipped: bool = False) -> None:
    """A store with its index."""
    path = make_store(folder, num_clips, groups, skipped=skipped)
    StoreWriter(path, settings_of("teacher")).write_index()


FIXTURES: dict[str, Callable[[Path, int, int], object]] = {
    "tars": lambda folder, size, _: make_tars(folder, size),
    "begun": lambda folder, size, _: make_begun(folder, size),
    "metadata": lambda folder, size, _: make_metadata(folder, size),
    "store": lambda folder, size, groups: make_indexed(folder, size, groups),
    "skipped": lambda folder, size, _: make_indexed(folder, size, 1, skipped=True),
    "run": lambda folder, size, _: make_run(folder, size),
    "nothing": lambda folder, *_: folder.mkdir(),
}


# Cells: each gets its fixture, an empty folder that is removed afterwards, and the size.


def timed(action: Callable[[], object]) -> Found:
    """Seconds by the clock, and of the processor in this process."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return {"s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}


def first_clip(dataset: Path, cache: Path, _: int) -> Found:
    """From the start of stage one to its first clip, of four kinds that three models make."""
    from stages.clips import ClipsConfig
    from stages.config import BaseModelConfig
    from stages.extract_features.config import ExtractConfig
    from stages.extract_features.run import extract_features
    from stages.progress import SilentProgress

    wall, processor = time.perf_counter(), time.process_time()
    first = Lock()

    class Extraction:
        size = None
        clips_per_batch = 1

        def __init__(self, *kinds: str) -> None:
            self.settings = {kind: settings_of(kind) for kind in kinds}

        def prepare(self, record: Any) -> None:
            seconds = time.perf_counter() - wall
            processor_s = time.process_time() - processor
            first.acquire()  # for good: several threads prepare clips
            report({"s": seconds, "processor_s": processor_s})
            os._exit(0)

    made = [Extraction("text"), Extraction("latents"), Extraction("teacher", "masks")]
    with patch("stages.extract_features.run.make_extractions", lambda *_: made):
        extract_features(
            ExtractConfig(device="cpu"),
            ClipsConfig(path=dataset),
            BaseModelConfig(path="no model"),
            cache,
            provenance={},
            progress=SilentProgress(),
        )
    raise SystemExit("no clip came")


def first_clip_again(begun: Path, empty: Path, size: int) -> Found:
    """The same where text is finished of all tars but one."""
    copy_links(begun / "cache", empty / "cache")
    return first_clip(begun / "tars", empty / "cache", size)


def write_index(cache: Path, empty: Path, _: int) -> Found:
    """All commit records read, checked and written as an index."""
    copy_links(cache, empty / "cache")
    path = store_of(empty / "cache")
    writer = StoreWriter.open(path.parent, settings_of("teacher"), provenance={})
    (path / "index.npz").unlink()
    return timed(writer.write_index) | {"MB": (path / "index.npz").stat().st_size / 1e6}


def open_reader(cache: Path, _: Path, size: int) -> Found:
    """Of a store with an index."""
    return timed(lambda: len(StoreReader(store_of(cache))))


def begin_shard(cache: Path, empty: Path, _: int) -> Found:
    """Open a store that has its index for writing, and take a shard."""
    copy_links(cache, empty / "cache")

    def begin() -> None:
        writer = StoreWriter.open(empty / "cache", settings_of("teacher"), provenance={})
        with writer.shard("zzzzz", source="another"):
            pass

    return timed(begin)


def begin_after_others(cache: Path, empty: Path, _: int) -> Found:
    """Take a shard after others have committed all clips, since this writer took its first."""
    commits = store_of(cache) / "commits"
    writer = StoreWriter.open(empty, settings_of("teacher"), provenance={})
    with writer.shard("yyyyy", source="another"):
        pass
    for record in commits.iterdir():
        os.link(record, writer.path / "commits" / record.name)

    def begin() -> None:
        with writer.shard("zzzzz", source="another"):
            pass

    return timed(begin)


def skip_clips(_: Path, empty: Path, size: int) -> Found:
    """All into one shard."""
    writer = StoreWriter.open(empty, settings_of("teacher"), provenance={})
    with writer.shard("00000", source="one") as shard:
        return timed(
            lambda: [
                shard.skip(key_of(number), "too_short", "short", fingerprint=fingerprint_of("a"))
                for number in range(size)
            ]
        )


def drop_together(cache: Path, empty: Path, size: int) -> Found:
    """Half of the first shard, and half of the second where there is one."""
    num_dropped = min(DROPPED, size // 2)
    first = PER_SHARD - num_dropped // 2 if size > PER_SHARD else 0
    return _drop(cache, empty, range(first, first + num_dropped))


def drop_spread(cache: Path, empty: Path, size: int) -> Found:
    """As many of every shard."""
    num_dropped = min(DROPPED, size // 2)
    return _drop(cache, empty, range(0, size, size // num_dropped))


def _drop(cache: Path, empty: Path, numbers: range) -> Found:
    from cache_schema.maintenance.drop import drop_clips

    copy_links(cache, empty / "cache")
    path, keys = store_of(empty / "cache"), [key_of(number) for number in numbers]
    return timed(lambda: drop_clips(path, keys, detail="by the benchmark"))


def verify(cache: Path, _: Path, size: int) -> Found:
    """Every byte of a store."""

    def check() -> None:
        found = verify_store(store_of(cache))
        assert not found.problems, found.problems[:3]
        assert found.num_clips == size

    return timed(check)


def console(cache: Path, empty: Path, *words: str) -> Found:
    """A command of `sam2vx-pipeline cache`; `{}` in its words is the store."""
    from pipeline.cli import app

    given = [word.format(store_of(cache)) for word in words]
    silent = (empty / "printed").open("w", encoding="utf-8")
    with patch("sys.stdout", silent):
        return timed(lambda: app(["cache", *given], standalone_mode=False))


def list_failures(cache: Path, empty: Path, _: int) -> Found:
    """All clips are skipped, and `failures.jsonl` is not there yet."""
    from stages.extract_features.summary import FAILURES_FILE, failure_manifest_written

    copy_links(cache, empty / "cache")

    def write() -> None:
        with failure_manifest_written(empty / "cache", print):
            pass

    return timed(write) | {"MB": (empty / "cache" / FAILURES_FILE).stat().st_size / 1e6}


def inodes(_: Path, empty: Path, size: int) -> Found:
    """Files and folders a clip over the four kinds, of a shard of 100 clips each."""
    if size > PER_SHARD:
        return {}
    counted, size = {}, 100
    for kind in KINDS:
        writer = StoreWriter.open(empty, settings_of(kind), provenance={})
        write_shard(writer, "00000", range(size), range(0))
        writer.write_index()
        counted[kind] = sum(1 for _ in writer.path.rglob("*")) / size
    return {"inodes": sum(counted.values()), **counted}


def order_clips(_: Path, __: Path, size: int) -> Found:
    """Where the first sample of training is in the shuffled clips."""
    from stages.train_student.data.order import SampleOrder

    return timed(lambda: SampleOrder([size], batch_size=8, seed=0).locate(0))


def report_page(run: Path, empty: Path, _: int) -> Found:
    """The page of a training run with as many steps as clips elsewhere."""
    from stages.train_student.report import write_report

    out = empty / "report.html"
    rows = sum(file.stat().st_size for file in run.glob("*.jsonl"))
    return timed(lambda: write_report(run, out)) | {"MB": out.stat().st_size / 1e6, "rows": rows}


def resume_rows(run: Path, empty: Path, size: int) -> Found:
    """Opening the losses of a run that goes on at its last step."""
    from stages.train_student.logging.rows import RowFile

    shutil.copy(run / "losses.jsonl", empty)
    return timed(lambda: RowFile(empty / "losses.jsonl", size - 1, lambda: None).close())


def import_all(*_: object) -> Found:
    """Modules of both stages."""
    return timed(lambda: __import__("stages.extract_features.run"))


CELLS: dict[str, tuple[str, bool, Callable[[Path, Path, int], Found]]] = {
    "a process that imports stage one": ("nothing", False, import_all),
    "files and folders a clip": ("nothing", False, inodes),
    "first clip, tars": ("tars", False, first_clip),
    "first clip, finished tars and one more": ("begun", False, first_clip_again),
    "first clip, metadata.jsonl": ("metadata", False, first_clip),
    "write the index": ("store", False, write_index),
    "open a reader": ("store", False, open_reader),
    "begin a shard, index there": ("store", False, begin_shard),
    "begin a shard, all committed since": ("store", False, begin_after_others),
    "skip all clips of a shard": ("nothing", False, skip_clips),
    "drop 1,000 clips of two shards": ("store", False, drop_together),
    "drop 1,000 clips of all shards": ("store", False, drop_spread),
    "cache list": ("store", False, lambda c, e, _: console(c, e, "list", str(c))),
    "cache verify": ("store", True, verify),
    "cache copy": ("store", True, lambda c, e, _: console(c, e, "copy", "{}", str(e / "copy"))),
    "write failures.jsonl": ("skipped", False, list_failures),
    "order of training": ("nothing", False, order_clips),
    "page of a run, size in steps": ("run", False, report_page),
    "resume losses.jsonl, size in steps": ("run", False, resume_rows),
}
"""Name, fixture, whether every shard needs the files of its clips, and what is done."""


def report(found: Found) -> None:
    """Print a cell's result with the most memory of this process; its last line."""
    from tests.benchmarks.open_index import resident_mb

    # Not getrusage's, which begins with what the driver had when it started this process.
    print(json.dumps(found | {"peak_mb": resident_mb("VmHWM")}), flush=True)


# The driver.


def main() -> None:
    """Measure what is not measured yet, and print the table of one label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="now", help="which results belong together")
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--limit", type=float, default=300, help="seconds of a cell")
    parser.add_argument("--groups-up-to", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--show", action="store_true", help="measure nothing, print what there is")
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        name, fixture, empty, size = options.cell
        report(CELLS[name][2](Path(fixture), Path(empty), int(size)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / "results.jsonl"
    for size in () if options.show else options.sizes:
        for name in options.only:
            known = of_label(results, options.label)
            if (name, size) not in known and not _hopeless(known, name, size, options):
                row = {"label": options.label, "cell": name, "size": size}
                found = measure(name, size, options)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | found) + "\n")
                print(f"{name}, {size}: {found}", file=sys.stderr, flush=True)
    show(of_label(results, options.label), options)


def of_label(results: Path, label: str) -> dict[tuple[str, int], Found]:
    """What has been measured under a label, by cell and size."""
    if not results.is_file():
        return {}
    rows = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {(row["cell"], row["size"]): row for row in rows if row["label"] == label}


def _hopeless(
    known: dict[tuple[str, int], Found], name: str, size: int, options: argparse.Namespace
) -> bool:
    too_long = any(
        "over_s" in row for (cell, smaller), row in known.items() if cell == name and smaller < size
    )
    return too_long or (CELLS[name][1] and size > options.groups_up_to)


def measure(name: str, size: int, options: argparse.Namespace) -> Found:
    """One cell, in a process of its own; its fixture is made first if it is not there."""
    kind = CELLS[name][0]
    fixture = options.folder / f"{kind}-{size}"
    if not fixture.exists():
        making = options.folder / f"{kind}-{size}.partial"
        shutil.rmtree(making, ignore_errors=True)
        groups = size // PER_SHARD if size <= options.groups_up_to else 2
        FIXTURES[kind](making, size, groups)
        making.rename(fixture)
    empty = options.folder / "cell"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    command = [sys.executable, __file__, "--cell", name, fixture, empty, str(size)]
    # The limit is on the whole process, which first imports and makes links.
    try:
        printed = subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if name == "cache copy" else None,  # a bar
            check=True,
            text=True,
            timeout=options.limit,
        ).stdout
        found: Found = json.loads(printed.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"over_s": options.limit}
    except subprocess.CalledProcessError as error:
        found = {"failed": error.returncode}
    finally:
        shutil.rmtree(empty, ignore_errors=True)
    return found


def exponent(known: dict[tuple[str, int], Found], name: str) -> float | None:
    """Of the growth of processor time between the two largest sizes; None below 0.2 s."""
    timings = sorted(
        (size, row["processor_s"])
        for (cell, size), row in known.items()
        if cell == name and row.get("processor_s")
    )
    if len(timings) < 2 or timings[-1][1] < 0.2:
        return None
    (small, before), (large, after) = timings[-2:]
    return math.log(after / before) / math.log(large / small)


def show(known: dict[tuple[str, int], Found], options: argparse.Namespace) -> None:
    """The table: seconds by the clock, of the processor, and the most memory."""
    import torch

    from tests.benchmarks.report import finish, machine, table

    sizes = sorted({size for _, size in known})
    rows = []
    growths = {}
    for name in CELLS:
        cells = [_cell(known.get((name, size))) for size in sizes]
        growths[name] = exponent(known, name)
        growth = growths[name]
        if any(cells):
            rows.append([name, *cells, "" if growth is None else f"{growth:.2f}"])
    over = [one for one in growths.values() if one is not None]
    header = ["", *(f"{size:,}" for size in sizes), "growth"]
    finish(
        "scale",
        table(header, rows),
        {
            "value": round(max(over, default=0.0), 2),
            "target": 1.2,
            "spread": [round(min(over, default=0.0), 2), round(max(over, default=0.0), 2)],
            "machine": machine(torch.device("cpu")),
            "settings": {
                "label": options.label,
                "limit_s": options.limit,
                "groups_up_to": options.groups_up_to,
            },
        },
        options.write,
    )


def _cell(row: Found | None) -> str:
    if not row:
        return ""
    if "over_s" in row:
        return f"> {row['over_s']:.0f} s"
    if "failed" in row:
        return "failed"
    if "inodes" in row:
        return f"{row['inodes']:.1f}"
    if "s" not in row:
        return ""
    size = f", {row['MB']:.3g} MB written" if "MB" in row else ""
    return f"{row['s']:.2g} s ({row['processor_s']:.2g}), {row['peak_mb']:.0f} MB{size}"


if __name__ == "__main__":
    main()
