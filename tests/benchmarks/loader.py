"""How fast training gets clips from the cache, and whether fast GPUs would ever wait for them.

    python tests/benchmarks/loader.py

First, clips per second and worker of the teacher's store: whole clips at random and temporal
crops, from a folder and from a web server on this machine, and the same files read by zarr-python.
Then training's own loader over all stores, for every GPU of a node, with a pause for each step in
which the GPU would compute, against the same steps with batches that are in memory. With a GPU, the
loader's own thread takes batches from the workers and pins them ahead of their step; without one it
has no such thread, and the benchmark puts one in its place, without pinning. The files lie in the
page cache: disks and networks are not measured.
"""

import argparse
import itertools
import multiprocessing
import queue
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_stores import configs, make_stores, web_server
from report import finish, machine, median_and_spread, table
from torch.utils.data import DataLoader, Dataset

from cache_schema import StoreReader
from stages.clips.config import ClipsConfig
from stages.train_student.config import KIND_OF_FORM
from stages.train_student.data.dataset import CachedSamples
from stages.train_student.data.loader import BatchLoader
from stages.train_student.data.order import micro_batches
from stages.train_student.data.stores import join_buckets

TARGET_CLIPS_PER_S = 100.0
TARGET_WAIT = 0.01
STEP_TFLOP = 842.0
"""One sample's step of CogVideoX-5B with LoRA at 49x480x720, without checkpointing."""
CROP = 12
"""Entries of a temporal crop: the pairs of 13 frames."""
MEMORY, CACHE, TAKEN_AHEAD = "memory", "the cache", "the cache, taken ahead by a thread"
FORMS = ("gram_flow", "features")
"""Each is the name of its array too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to read the teacher's store."""

    name: str
    where: str
    """Folder or URL."""
    crop: bool = False
    zarr: bool = False
    workers: int = 1
    start: str = "fork"
    delivered: bool = False
    """Whether clips come to the process that asks, as in training, or end in the worker."""


class Clips(Dataset[Any]):
    """Random clips of a store, or random crops of them."""

    def __init__(self, way: Way, array: str) -> None:
        self._way = way
        self._array = array
        self._read: Callable[[int], np.ndarray] | None = None

    def __getitem__(self, number: int) -> Any:
        if self._read is None:
            # In the worker: zarr's threads do not survive a fork.
            self._read = self._zarr() if self._way.zarr else self._reader()
        started = time.process_time()
        values = self._read(number)
        taken = time.process_time() - started
        return taken, torch.from_numpy(values) if self._way.delivered else None

    def _reader(self) -> Callable[[int], np.ndarray]:
        reader = StoreReader(self._way.where)
        keys, array = reader.keys, self._array
        last = reader.settings.arrays[array].shape[0] - CROP

        def read(number: int) -> np.ndarray:
            key = keys[number % len(keys)]
            if not self._way.crop:
                return reader.read(key, [array])[array]
            start = number % (last + 1)
            return reader.read_part(key, array, start, start + CROP)

        return read

    def _zarr(self) -> Callable[[int], np.ndarray]:
        import zarr

        shards = sorted(Path(self._way.where, "shards").iterdir())
        arrays: list[Any] = [zarr.open_group(shard, mode="r")[self._array] for shard in shards]
        clips = [(array, index) for array in arrays for index in range(array.shape[0])]
        last = arrays[0].shape[1] - CROP

        def read(number: int) -> np.ndarray:
            array, index = clips[number % len(clips)]
            if not self._way.crop:
                return array[index]
            start = number % (last + 1)
            return array[index, start : start + CROP]

        return read


def endless(seed: int) -> Iterator[int]:
    """Random numbers of clips."""
    random = np.random.default_rng(seed)
    while True:
        yield int(random.integers(2**40))


def read_for(way: Way, array: str, seconds: float, seed: int) -> tuple[float, float]:
    """Clips per second and worker once every worker is at it, and CPU seconds of reading one."""
    loader = DataLoader(
        Clips(way, array),
        sampler=endless(seed),
        batch_size=None,
        num_workers=way.workers,
        multiprocessing_context=way.start,
    )
    clips = iter(loader)
    for _ in range(4 * way.workers + 4):
        next(clips)
    computing = []
    started = time.perf_counter()
    while (taken := time.perf_counter() - started) < seconds:
        computing.append(next(clips)[0])
    return len(computing) / taken / way.workers, statistics.median(computing)


def ways(folder: str, url: str, most_workers: int) -> list[Way]:
    """What is measured."""
    counts = [count for count in (1, 2, 4, 8) if count <= most_workers]
    return [
        *(Way(name="folder", where=folder, workers=count) for count in counts),
        Way(name="folder", where=folder, start="spawn"),
        *(Way(name="folder, delivered", where=folder, workers=n, delivered=True) for n in (1, 2)),
        Way(name="folder, crops", where=folder, crop=True),
        *(Way(name="web server", where=url, workers=count) for count in (1, 2)),
        Way(name="web server, crops", where=url, crop=True),
        *(Way(name="zarr-python", where=folder, zarr=True, workers=count) for count in (1, 2)),
        Way(name="zarr-python, crops", where=folder, zarr=True, crop=True),
    ]


def measure_reading(
    chosen: list[Way], options: argparse.Namespace
) -> dict[Way, list[tuple[float, float]]]:
    """What `read_for` says of every way, all of them in turn, several times."""
    found: dict[Way, list[tuple[float, float]]] = {way: [] for way in chosen}
    for repeat in range(options.repeats):
        for way in chosen:
            found[way].append(read_for(way, options.form, options.seconds, repeat))
    return found


class Node:
    """The ranks of a node, each with a loader of its own and a pause for each step."""

    def __init__(self, cache: Path, options: argparse.Namespace) -> None:
        self._options = options
        sizes, kinds = ClipsConfig(path=cache).sizes, (KIND_OF_FORM[options.form],)
        stores = join_buckets(cache, sizes, {}, kinds=kinds).stores
        self._samples = CachedSamples(stores, configs(), seed=0, batch_size=options.gpus)
        self._in_memory = [self._samples[number] for number in range(2)]
        self.worker_bytes: list[tuple[int, int]] = []
        """Private and proportional memory of every worker seen."""

    def run(self, source: str) -> tuple[float, float]:
        """Seconds of all steps, and the share of them that ranks waited, of the mean rank."""
        context = multiprocessing.get_context("fork")
        ready, answers = context.Barrier(self._options.gpus), context.SimpleQueue()
        ranks = [
            context.Process(target=self._rank, args=(rank, source, ready, answers))
            for rank in range(self._options.gpus)
        ]
        for rank in ranks:
            rank.start()
        found = [answers.get() for _ in ranks]
        for rank in ranks:
            rank.join()
        for _, _, worker_bytes in found:
            self.worker_bytes += worker_bytes
        taken = max(seconds for seconds, _, _ in found)
        return taken, statistics.mean(waited / seconds for seconds, waited, _ in found)

    def _rank(self, rank: int, source: str, ready: Any, answers: Any) -> None:
        """A process of its own, as in training."""
        batches = self._batches(rank, source)
        next(batches)
        ready.wait()
        started, waited = time.perf_counter(), 0.0
        for _ in range(self._options.steps):
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
            time.sleep(self._options.step_seconds)
        taken = time.perf_counter() - started
        workers = multiprocessing.active_children()
        answers.put((taken, waited, [memory_of(worker.pid) for worker in workers]))

    def _batches(self, rank: int, source: str) -> Iterator[Any]:
        if source == MEMORY:
            return itertools.cycle(self._in_memory)
        options = self._options
        numbers: Iterable[list[int]] = micro_batches(
            range(options.steps + 1),
            batch_size=options.gpus,
            micro_batch_size=1,
            rank=rank,
            world_size=options.gpus,
        )
        batches = BatchLoader(
            self._samples,
            numbers,
            workers=options.loader_workers,
            start=options.loader_start,
            pin_memory=False,
        )
        return taken_ahead(batches) if source == TAKEN_AHEAD else batches


def taken_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, each taken by a thread while the one before it is in use."""
    taken: queue.Queue[Any] = queue.Queue(maxsize=1)

    def take() -> None:
        for batch in batches:
            taken.put(batch)

    threading.Thread(target=take, daemon=True).start()
    while True:
        yield taken.get()


def memory_of(pid: int | None) -> tuple[int, int]:
    """Private and proportional bytes of a process."""
    kib = {"Private_Clean": 0, "Private_Dirty": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in kib:
            kib[name] = int(rest.split()[0])
    return (kib["Private_Clean"] + kib["Private_Dirty"]) * 1024, kib["Pss"] * 1024


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=FORMS, default="gram_flow")
    parser.add_argument("--field", default="rough", help="a name of teacher_samples.FIELDS")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--most-workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each rate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=1000.0, help="of a GPU, achieved")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--loader-workers", type=int, default=2, help="of every GPU's process")
    parser.add_argument("--loader-start", choices=("fork", "spawn"), default="fork")
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    options = parser.parse_args()
    # More workers than cores are part of what is measured.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    options.step_seconds = STEP_TFLOP / options.tflops
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        stores = make_stores(cache, options.form, options.clips, options.field)
        teacher = stores["gram_flow" if options.form == "gram_flow" else "teacher"]
        reader = StoreReader(teacher)
        clip_bytes = reader.num_bytes / len(reader)
        with web_server(cache) as url:
            chosen = ways(str(teacher), f"{url}/{teacher.name}", options.most_workers)
            rates = measure_reading(chosen, options)
        node = Node(cache, options)
        sides: dict[str, list[tuple[float, float]]] = {MEMORY: [], CACHE: [], TAKEN_AHEAD: []}
        for _ in range(options.repeats):
            for source, runs in sides.items():
                runs.append(node.run(source))
    report(rates, sides, node.worker_bytes, clip_bytes, options)


def report(
    rates: dict[Way, list[tuple[float, float]]],
    sides: dict[str, list[tuple[float, float]]],
    worker_bytes: list[tuple[int, int]],
    clip_bytes: float,
    options: argparse.Namespace,
) -> None:
    """Print the tables."""
    rows = []
    for way, found in rates.items():
        median, (low, high) = median_and_spread([rate for rate, _ in found])
        computing = 1e3 * median_and_spread([seconds for _, seconds in found])[0]
        row = [way.name, way.start, str(way.workers), f"{median:.0f}", f"{low:.0f} to {high:.0f}"]
        rows.append([*row, f"{median * way.workers:.0f}", f"{computing:.1f}"])
    header = ["read from", "started by", "workers", "clips/s each", "spread", "clips/s together"]
    header.append("CPU ms a clip")
    named = {(way.name, way.workers, way.start): found for way, found in rates.items()}
    ours, zarr = (
        [rate for rate, _ in named[name, 1, "fork"]] for name in ("folder", "zarr-python")
    )
    value, spread = median_and_spread(ours)
    waits = []
    for name, runs in sides.items():
        share, (low, high) = median_and_spread([100 * wait for _, wait in runs])
        rate = median_and_spread([options.gpus * options.steps / taken for taken, _ in runs])[0]
        waits.append([name, f"{share:.3f}%", f"{low:.3f}% to {high:.3f}%", f"{rate:.2f}"])
    private, shared = (
        median_and_spread([found[part] / 2**20 for found in worker_bytes]) for part in (0, 1)
    )
    memory = (
        f"A worker's memory: private {private[0]:.0f} MiB ({private[1][0]:.0f} to "
        f"{private[1][1]:.0f}), with its part of what is shared {shared[0]:.0f} MiB."
    )
    texts = [
        f"{clip_bytes / 1e6:.2f} MB a clip on disk.",
        table(header, rows),
        f"{options.gpus} GPUs, a step every {options.step_seconds:.3f} s, "
        f"{options.loader_workers} workers each:",
        table(["batches from", "wait of the step", "spread", "samples/s"], waits),
        memory,
    ]
    ratio, _ = median_and_spread([a / b for a, b in zip(ours, zarr, strict=True)])
    finish(
        "loader",
        "\n\n".join(texts),
        {
            "value": round(value, 1),
            "target": TARGET_CLIPS_PER_S if options.form == "gram_flow" else None,
            "spread": [round(rate, 1) for rate in spread],
            "ratio_to_zarr": round(ratio, 2),
            "wait_share": round(median_and_spread([wait for _, wait in sides[TAKEN_AHEAD]])[0], 5),
            "target_wait_share": TARGET_WAIT,
            "worker_private_mib": round(private[0]),
            "machine": machine(torch.device("cpu")),
            "settings": {
                key: str(value)
                for key, value in vars(options).items()
                if key not in ("write", "step_seconds")
            },
        },
        options.write,
    )


if __name__ == "__main__":
    main()
