"""Local engine: runs jobs in this process, which may share them with other processes.

Processes share jobs without communication: the holder of a shard's lock writes it, and a lock is
released when its process ends. Each process starts with its own share and continues with jobs that
others have not finished, including those of a process that died.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch

from cache_schema import ShardBusy, StoreWriter
from cache_schema.shown_text import first_few
from stages.clips import InputShard
from stages.extract_features.config import Kind
from stages.extract_features.execution.jobs import (
    JobPlan,
    JobReport,
    ShardJob,
    pending_jobs,
    rank_order,
)
from stages.extract_features.execution.worker import Fingerprint, ShardWorker
from stages.extract_features.extraction import Extraction, bucket_name
from stages.processes.stop_request import check_stop
from stages.progress import Progress


class LocalEngine:
    """Runs the jobs that no other process has finished or is running.

    Args:
        shards: The input's shards by name.
        fingerprint: Returns the fingerprint of a record's entry in a store of a kind.
        device: Device of this process.
        rank: Rank of this process.
        world_size: Number of processes that share the jobs.
    """

    def __init__(
        self,
        shards: Mapping[str, InputShard],
        fingerprint: Fingerprint,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        self._shards = shards
        self._counts = ClipCounts(shards)
        self._fingerprint = fingerprint
        self._device = device
        self._rank = rank
        self._world_size = world_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Do nothing: no resources are kept between runs."""

    def run(
        self,
        extraction: Extraction,
        writers: Mapping[Kind, StoreWriter],
        plan: JobPlan,
        progress: Progress,
    ) -> JobReport:
        """Write one extraction's stores, except for shards that other processes are writing."""
        report = JobReport()
        with (
            JobsBar(extraction, writers, self._counts, plan, progress) as bar,
            ShardWorker(
                extraction,
                writers,
                self._shards,
                self._fingerprint,
                self._device,
                advance=bar.advance,
                log=progress.log,
            ) as worker,
        ):
            jobs = rank_order(plan.jobs, self._rank, self._world_size)
            _run_jobs(jobs, worker, writers, bar, report, progress)
        return report


def _run_jobs(
    jobs: Sequence[ShardJob],
    worker: ShardWorker,
    writers: Mapping[Kind, StoreWriter],
    bar: "JobsBar",
    report: JobReport,
    progress: Progress,
) -> None:
    for job in jobs:
        if not job.is_pending(writers):
            continue
        try:
            worker.work(job, report)
            bar.done(job)
        except ShardBusy as error:
            progress.log(f"{' and '.join(job.keys)}: postponed, {error}")
        bar.count_others()


POLL_INTERVAL_S = 5.0

_MAX_NAMED = 5
"""Maximum number of shards named in a message."""


def wait_for_others(left: Callable[[], Mapping[str, bool]], progress: Progress) -> None:
    """Wait until no shard is left, or until one is left that no process is writing.

    There is no time limit, since a shard may take long. A lock is released when its process ends.

    Args:
        left: Returns the unfinished shards, and whether another process is writing each.
        progress: Logs the shards that are waited for, whenever they change.
    """
    logged: set[str] = set()
    while (shards := left()) and all(shards.values()):
        if logged != shards.keys():
            logged = set(shards)
            named = first_few(sorted(logged), _MAX_NAMED)
            progress.log(f"waiting for other processes, which are writing {named}")
        time.sleep(POLL_INTERVAL_S)
        check_stop()


class ClipCounts:
    """Number of clips per shard of the dataset, cached for all kinds of a run."""

    def __init__(self, shards: Mapping[str, InputShard]) -> None:
        self._shards = shards
        self._read: dict[str, int] = {}

    def known(self, job: ShardJob) -> int | None:
        """Return the number of clips of a job; None if its shard has not been read."""
        listed = job.listed_clips(self._shards)
        return self._read.get(job.input_name) if listed is None else listed

    def read(self, job: ShardJob) -> int:
        """Return the number of clips of a job; may read the headers of a tar."""
        known = self.known(job)
        if known is None:
            known = self._read[job.input_name] = self._shards[job.input_name].num_clips()
        return known


_LISTING_INTERVAL_S = 10.0
"""Interval of listing the shards that other processes have finished."""


class JobsBar:
    """Progress bar over all jobs, including those that other processes finish.

    A tar's clips are counted when its first clip is done. Until then, or if another process writes
    it, the mean over the counted shards is assumed.
    """

    def __init__(
        self,
        extraction: Extraction,
        writers: Mapping[Kind, StoreWriter],
        counts: ClipCounts,
        plan: JobPlan,
        progress: Progress,
    ) -> None:
        self._writers = writers
        self._counts = counts
        self._unfinished = {job.name: job for job in pending_jobs(plan.jobs, writers)}
        self._num_settled = plan.num_settled
        self._num_jobs = len(self._unfinished)
        self._clips_by_job: dict[str, int] = {}
        """Number of clips by job, including finished jobs."""
        self._num_counted = 0
        """Total clips of these jobs."""
        for job in self._unfinished.values():
            clips = counts.known(job)
            if clips is not None:
                self._count(job, clips)
        bucket = bucket_name(extraction.size)
        self._bar = progress.task(
            " and ".join(writers) + (f" {bucket}" if bucket else ""),
            self._total(),
            completed=plan.num_settled,
            unit="clips",
        )

    def __enter__(self) -> "JobsBar":
        self._task = self._bar.__enter__()
        self._listed_at = time.monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        self._count_others()
        self._bar.__exit__(None, None, None)

    def advance(self, job: ShardJob, clips: int) -> None:
        """Add finished clips of a job of this process."""
        if clips and job.name not in self._clips_by_job:
            self._count(job, self._counts.read(job))
            self._update_total()
        self._task.advance(clips)

    def done(self, job: ShardJob) -> None:
        """Mark a job of this process as done; its clips were added by `advance`."""
        self._unfinished.pop(job.name, None)
        if job.name not in self._clips_by_job:
            self._count(job, 0)
            self._update_total()

    def count_others(self) -> None:
        """Add the jobs that other processes have finished, at most once per listing interval."""
        if time.monotonic() - self._listed_at >= _LISTING_INTERVAL_S:
            self._count_others()
            self._listed_at = time.monotonic()

    def _count(self, job: ShardJob, clips: int) -> None:
        self._clips_by_job[job.name] = clips
        self._num_counted += clips

    def _mean_clips(self) -> float | None:
        return self._num_counted / len(self._clips_by_job) if self._clips_by_job else None

    def _total(self) -> int | None:
        mean, unknown = self._mean_clips(), self._num_jobs - len(self._clips_by_job)
        if mean is None:
            return None if unknown else self._num_settled
        return self._num_settled + self._num_counted + round(mean * unknown)

    def _update_total(self) -> None:
        total = self._total()
        assert total is not None
        self._task.expect(total)

    def _count_others(self) -> None:
        unfinished = pending_jobs(self._unfinished.values(), self._writers)
        left = {job.name for job in unfinished}
        for name, job in list(self._unfinished.items()):
            if name not in left:
                del self._unfinished[name]
                if name not in self._clips_by_job:
                    self._count(job, round(self._mean_clips() or 0))
                self._task.advance(self._clips_by_job[name])
        if self._clips_by_job:
            self._update_total()
