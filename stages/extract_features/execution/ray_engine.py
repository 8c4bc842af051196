"""Ray engine: runs jobs on workers of a cluster whose machines may come and go.

The driver assigns one shard at a time. If a worker dies or does not respond, it is replaced and its
shard is reassigned; the next worker continues after the staged clips. The stores are in a folder
that all machines of the cluster share under the same path.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from cache_schema import StoreWriter
from stages.clips import InputShard
from stages.extract_features.config import Kind, RayConfig
from stages.extract_features.execution.jobs import JobPlan, JobReport, ShardJob, pending_jobs
from stages.extract_features.execution.local_engine import ClipCounts, JobsBar
from stages.extract_features.execution.ray_worker import RayWorker, WorkerSetup
from stages.extract_features.extraction import Extraction
from stages.extract_features.kinds import resolve_device
from stages.progress import Progress

_POLL_S = 0.5
_IDLE_POLLS = 60
REPORT_TIMEOUT_S = 600.0
"""Time without a progress report after which a worker is replaced."""
_STARTING = "starting"
_OBJECT_STORE_BYTES = 100 * 2**20
"""Small, since clips do not pass through the object store; Ray requires at least 75 MB."""


def import_ray() -> Any:
    """Import Ray.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            'extract.engine=ray needs Ray: pip install "sam2videox[ray]", or set '
            "extract.engine=local"
        ) from error
    return ray


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[Any]:
    """Connect to the cluster, unless connected already; disconnect on exit.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=max(config.workers or 1, os.cpu_count() or 1),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
    else:
        try:
            ray.init(address=config.address, **quiet)
        except ConnectionError as error:
            raise ValueError(
                f"no Ray cluster at extract.ray.address={config.address} ({error}); null starts "
                "Ray on this machine"
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class RayEngine:
    """Runs jobs on workers of a Ray cluster.

    Args:
        setup: Setup of the workers; kinds and `store_hashes` are filled in per run.
        shards: The dataset's shards by name.

    Raises:
        ValueError: `extract.device` is not a device.
    """

    def __init__(self, setup: WorkerSetup, shards: Mapping[str, InputShard]) -> None:
        if not setup.config.device.startswith("cuda"):  # the driver may have no GPU
            resolve_device(setup.config.device, 0)
        self._setup = setup
        self._counts = ClipCounts(shards)
        self._cluster = ray_cluster(setup.config.ray)

    def __enter__(self) -> Self:
        """Connect to the cluster.

        Raises:
            ValueError: Ray is not installed, there is no cluster at the address, or the cluster
                has no GPU although `extract.device` is one.
        """
        self._ray = self._cluster.__enter__()
        device = self._setup.config.device
        if device.startswith("cuda") and not self._ray.cluster_resources().get("GPU"):
            self._cluster.__exit__(None, None, None)
            raise ValueError(f"extract.device={device}, but the Ray cluster has no GPU")
        return self

    def __exit__(self, *exc: object) -> None:
        self._cluster.__exit__(None, None, None)

    def run(
        self,
        extraction: Extraction,
        writers: Mapping[Kind, StoreWriter],
        plan: JobPlan,
        progress: Progress,
    ) -> JobReport:
        """Write one extraction's stores, except for shards that other processes are writing.

        Raises:
            RuntimeError: Workers died repeatedly.
            Exception: An error in a worker; the other workers are stopped.
        """
        setup = self._setup.for_stores(
            {kind: settings.hash for kind, settings in extraction.settings.items()},
            extraction.size,
        )
        report = JobReport()
        pending = pending_jobs(plan.jobs, writers)
        with JobsBar(extraction, writers, self._counts, plan, progress) as bar:
            pool = _WorkerPool(self._ray, setup, bar, report, progress)
            try:
                pool.run(pending)
            finally:
                pool.shutdown()
        return report


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker actor and its current call."""

    actor: Any
    result: Any
    """Object reference of the current call's result."""
    job: ShardJob | None = None
    """None while the worker starts."""
    unanswered_since: float | None = None
    """Time of the first progress request without a response."""


class _WorkerPool:
    """Workers that are started on demand and replaced when they die."""

    def __init__(
        self, ray: Any, setup: WorkerSetup, bar: JobsBar, report: JobReport, progress: Progress
    ) -> None:
        self._ray = ray
        self._setup = setup
        self._bar = bar
        self._report = report
        self._progress = progress
        self._workers: list[_Worker] = []
        self._deaths: Counter[str] = Counter()
        self._clips_shown: Counter[str] = Counter()
        self._idle_polls = 0

    def run(self, jobs: Sequence[ShardJob]) -> None:
        """Run all jobs, except those that processes outside this run are writing."""
        queue = deque(jobs)
        while queue or any(worker.job for worker in self._workers):
            self._spawn(len(queue))
            workers = {worker.result: worker for worker in self._workers}
            ready, _ = self._ray.wait(list(workers), timeout=_POLL_S)
            for result in ready:
                self._on_result(workers[result], queue)
            if not ready:
                self._poll_progress(queue)
                self._log_when_idle()

    def shutdown(self) -> None:
        """Kill all workers."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []

    def _spawn(self, num_queued: int) -> None:
        resources = self._ray.cluster_resources()
        config = self._setup.config
        gpus = 0 if config.device == "cpu" else int(resources.get("GPU", 0))
        wanted = config.ray.workers or max(1, gpus)
        working = sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(wanted, num_queued + working):
            actor_class = self._ray.remote(concurrency_groups={"report": 1})(RayWorker)
            actor = actor_class.options(num_cpus=1, num_gpus=1 if gpus else 0).remote(self._setup)
            self._workers.append(_Worker(actor, actor.prepare.remote()))

    def _on_result(self, worker: _Worker, queue: deque[ShardJob]) -> None:
        """Process a worker's result, and assign it the next job."""
        errors, job = self._ray.exceptions, worker.job
        try:
            report = self._ray.get(worker.result)
        except errors.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error  # keeps the worker's traceback
            raise
        except errors.RayError as error:
            self._on_death(worker, str(error))
            if job is not None:
                queue.append(job)
            return
        if job is None:
            self._deaths[_STARTING] = 0
            self._progress.log(f"ray: {report} is ready")
        else:
            self._show(job, report.clips, report.lines)
            if report.result is not None:
                self._report.add(report.result)
                self._bar.done(job)
        worker.job = queue.popleft() if queue else None
        if worker.job is None:
            self._workers.remove(worker)
            self._ray.kill(worker.actor)
        else:
            worker.unanswered_since = None
            worker.result = worker.actor.work.remote(worker.job)

    def _on_death(self, worker: _Worker, why: str) -> None:
        self._workers.remove(worker)
        # It may only be unreachable, and must not continue beside its replacement.
        self._ray.kill(worker.actor)
        what = f"shard {worker.job.name!r}" if worker.job else _STARTING
        self._deaths[what] += 1
        first_line = why.strip().partition("\n")[0]
        restarts = self._setup.config.ray.restarts
        if self._deaths[what] > restarts:
            raise RuntimeError(
                f"{self._deaths[what]} workers in a row died on {what} (extract.ray.restarts="
                f"{restarts}): {first_line} The usual cause is running out of memory; see ray "
                "logs. Finished clips are kept"
            )
        self._progress.log(f"ray: a worker died on {what}, starting another one: {first_line}")

    def _poll_progress(self, queue: deque[ShardJob]) -> None:
        """Show the workers' progress, and replace those that do not respond."""
        working = {m.actor.report.remote(): m for m in self._workers if m.job is not None}
        if not working:
            return
        ready, unanswered = self._ray.wait(list(working), num_returns=len(working), timeout=_POLL_S)
        now = time.monotonic()
        for request in unanswered:
            worker = working[request]
            if worker.unanswered_since is None:
                worker.unanswered_since = now
            elif now - worker.unanswered_since > REPORT_TIMEOUT_S and worker.job is not None:
                queue.append(worker.job)
                self._on_death(worker, f"it has not responded for {REPORT_TIMEOUT_S:g} s.")
        for request in ready:
            working[request].unanswered_since = None
            job = working[request].job
            try:
                report = self._ray.get(request)
            except self._ray.exceptions.RayError:
                continue  # the result of its job raises the error
            if job is not None and report.job == job.name:
                self._show(job, report.clips, report.lines)

    def _show(self, job: ShardJob, clips: int, lines: Sequence[str]) -> None:
        """Advance the bar by new clips: clips that a second worker repeats are counted once."""
        self._bar.advance(job, max(0, clips - self._clips_shown[job.name]))
        self._clips_shown[job.name] = max(clips, self._clips_shown[job.name])
        for line in lines:
            self._progress.log(line)

    def _log_when_idle(self) -> None:
        working = any(worker.job for worker in self._workers)
        self._idle_polls = 0 if working else self._idle_polls + 1
        if self._idle_polls == _IDLE_POLLS:
            self._progress.log(
                "ray: no worker has started yet; each needs one CPU, and one GPU if the cluster "
                f"has any. The cluster has {self._ray.cluster_resources()}"
            )
