"""What `scale.py` measures: each cell gets its fixture, an empty folder that is removed afterwards,
and the size.
"""

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

from cache_schema import StoreReader, StoreWriter, verify_store
from tests.benchmarks.scale_fixtures import (
    DROPPED,
    KINDS,
    PER_SHARD,
    SMALL,
    Found,
    copy_links,
    key_of,
    settings_of,
    store_of,
    write_shard,
)
from tests.fingerprints import fingerprint_of

SAMPLES = 512


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

        def skip_all() -> None:
            for number in range(size):
                shard.skip(key_of(number), "too_short", "short", fingerprint=fingerprint_of("a"))

        return timed(skip_all)


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


def start_training(cache: Path, _: Path, __: int) -> Found:
    """Open three stores, join them, hold out eight clips, and find the first sample's clip."""
    from stages.train_student.data.order import SampleOrder
    from stages.train_student.data.stores import join_buckets

    sizes = _small_clips(cache)

    def start() -> None:
        (stores,) = join_buckets(cache, sizes, {}, kinds=("gram_flow",), held_out=8).stores
        SampleOrder([len(stores.keys)], batch_size=8, seed=0).locate(0)

    return timed(start)


def load_samples(cache: Path, _: Path, __: int) -> Found:
    """Samples of random clips, read in this process once training has started."""
    from stages.train_student.data.dataset import CachedSamples
    from stages.train_student.data.loader import BatchLoader
    from stages.train_student.data.stores import join_buckets
    from tests.benchmarks.loader_stores import configs

    stores = join_buckets(cache, _small_clips(cache), {}, kinds=("gram_flow",)).stores
    samples = CachedSamples(stores, configs(), seed=0, batch_size=8)
    numbers = ([number] for number in range(SAMPLES + 1))
    with BatchLoader(samples, numbers, workers=0, pin_memory=False) as batches:
        next(batches)
        return timed(lambda: list(batches))


def _small_clips(cache: Path) -> Any:
    from stages.clips import ClipsConfig

    frames, height, width = SMALL
    return ClipsConfig(path=cache, num_frames=frames, height=height, width=width).sizes


def count_operations(_: Path, empty: Path, size: int) -> Found:
    """Operations on names and opened files a clip and kind, of a shard of 100 clips: by an audit
    hook, so that `stat` is not among them."""
    if size > PER_SHARD:
        return {}
    counted: Counter[str] = Counter()
    counting = ""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if counting and (event == "open" or event.startswith("os.")):
            path = arguments[0] if arguments else ""
            if str(path).startswith(str(empty)):
                counted[counting] += 1

    sys.addaudithook(hook)
    clips = 100
    for kind in KINDS:
        writer = StoreWriter.open(empty, settings_of(kind), provenance={})
        counting = "write"
        write_shard(writer, "00000", range(clips), range(0))
        counting = ""
        writer.write_index()
        reader = StoreReader(writer.path)
        counting = "read"
        for key in reader.keys:
            reader.read(key)
        counting = ""
    return {f"{name}_operations": count / clips for name, count in counted.items()}


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
    "operations a clip": ("nothing", False, count_operations),
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
    "training start": ("trainable", False, start_training),
    "512 samples of the loader": ("trainable", True, load_samples),
    "page of a run, size in steps": ("run", False, report_page),
    "resume losses.jsonl, size in steps": ("run", False, resume_rows),
}
"""Name, fixture, whether every shard needs the files of its clips, and what is done."""


def report(found: Found) -> None:
    """Print a cell's result with the most memory of this process; its last line."""
    from tests.benchmarks.open_index import resident_mb

    # Not getrusage's, which begins with what the driver had when it started this process.
    print(json.dumps(found | {"peak_mb": resident_mb("VmHWM")}), flush=True)
