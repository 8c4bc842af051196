"""Worker of the Ray engine: an actor for one extraction that writes one shard at a time."""

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

from cache_schema import ShardBusy, StoreWriter, list_stores
from stages.clips import ClipsConfig, open_dataset
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig, Kind
from stages.extract_features.execution.jobs import JobReport, ShardJob
from stages.extract_features.execution.worker import ShardWorker
from stages.extract_features.fingerprints import fingerprint_of
from stages.extract_features.kinds import make_extractions, resolve_device


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """Setup of a worker; plain data."""

    config: ExtractConfig
    clips: ClipsConfig
    """The dataset and its clip size."""
    model: BaseModelConfig
    cache_root: Path
    folder: Path
    """Base folder of relative paths in the configuration."""
    store_hashes: Mapping[Kind, str] = field(default_factory=dict)
    """Hashes of the extraction's stores, by kind."""

    def for_stores(self, hashes: Mapping[Kind, str], size: ClipsConfig | None) -> Self:
        """Return a copy for the stores of one extraction and clip size."""
        config = self.config.model_copy(update={"kinds": tuple(hashes)})
        clips = self.clips if size is None else size
        return replace(self, config=config, clips=clips, store_hashes=dict(hashes))


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkReport:
    """Progress or result of a job."""

    job: str
    clips: int
    """Number of clips processed."""
    lines: tuple[str, ...]
    """Log lines."""
    result: JobReport | None = None
    """None if another process has the shard or the job is running."""


class RayWorker:
    """The actor; Ray calls `report` in a separate thread."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._job = ""
        self._clips = 0
        self._lines: list[str] = []

    def prepare(self) -> str:
        """Build the extraction and open its stores; return the worker's name.

        Raises:
            ValueError: This machine lacks the model files, has other weights than the driver, or
                does not see the stores.
        """
        with contextlib.suppress(FileNotFoundError):  # absolute paths do not need it
            os.chdir(self._setup.folder)
        config, cache_root = self._setup.config, self._setup.cache_root
        (extraction,) = make_extractions(config, (self._setup.clips,), self._setup.model)
        host = socket.gethostname()
        here = {Path(store).name for store in list_stores(cache_root)}
        for kind, settings in extraction.settings.items():
            if settings.hash != self._setup.store_hashes[kind]:
                raise ValueError(
                    f"machine {host} would write another {kind} store than the driver: its model "
                    "files or its installation differ"
                )
            if settings.folder_name not in here:
                raise ValueError(
                    f"machine {host} does not see {cache_root / settings.folder_name}; the cache "
                    "must be a folder that every machine of the Ray cluster shares"
                )
        writers = {
            kind: StoreWriter.open(cache_root, settings, provenance={})
            for kind, settings in extraction.settings.items()
        }
        shards = {shard.name: shard for shard in open_dataset(self._setup.clips).shards}
        # Ray makes only the worker's own GPU visible, as device 0.
        device = resolve_device("auto" if config.device.startswith("cuda") else config.device, 0)
        self._worker = ShardWorker(
            extraction,
            writers,
            shards,
            partial(fingerprint_of, teacher=config.teacher),
            device,
            advance=self._advance,
            log=self._lines.append,
        )
        return f"worker {os.getpid()} on {host}"

    def work(self, job: ShardJob) -> WorkReport:
        """Write and commit a shard, unless another process is writing it."""
        self._job, self._clips = job.name, 0
        result = JobReport()
        try:
            self._worker.work(job, result)
        except ShardBusy as busy:
            self._lines.append(f"{' and '.join(job.keys)}: postponed, {busy}")
            return self.report()
        return replace(self.report(), result=result)

    def report(self) -> WorkReport:
        """Return the progress, and the log lines since the last report."""
        lines = tuple(self._lines)
        del self._lines[: len(lines)]
        return WorkReport(job=self._job, clips=self._clips, lines=lines)

    def _advance(self, _: ShardJob, clips: int) -> None:
        self._clips += clips
