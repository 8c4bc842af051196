"""The Ray engine: workers on a cluster whose machines come and go; `extract` uses it.

The driver hands out one shard at a time. A worker that dies, or does not answer, gives its shard
back: what it had staged is adopted by whoever gets the shard next, and a new worker takes its
place. The stores lie in a folder that every machine of the cluster sees under the same path.
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
from stages.extract_features.execution.jobs import JobPlan, ShardJob, pending_jobs
from stages.extract_features.execution.local_engine import ClipCounts, EngineReport, JobsBar
from stages.extract_features.execution.ray_worker import RayWorker, WorkerSetup
from stages.extract_features.extraction import Extraction
from stages.extract_features.kinds import device_named
from stages.progress import Progress

_POLL_S = 0.5
_IDLE_POLLS = 60
REPORT_TIMEOUT_S = 600.0
"""How long a worker may leave questions about its progress unanswered before another takes over."""
_STARTING = "starting"
_OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's smallest is 75 MB; clips do not travel through it."""


def import_ray() -> Any:
    """Ray itself.

    Raises:
        ValueError: It is not installed.
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
    """Be connected to the cluster; what was not connected before is left afterwards.

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
    """Hands the jobs to workers on a Ray cluster.

    Args:
        setup: What the workers need to know; `kinds` and `store_hashes` are filled in per run.
        shards: The dataset's, by name.

    Raises:
        ValueError: `extract.device` is none.
    """

    def __init__(self, setup: WorkerSetup, shards: Mapping[str, InputShard]) -> None:
        if not setup.config.device.startswith("cuda"):  # of which this machine may have none
            device_named(setup.config.device, 0)
        self._setup = setup
        self._counts = ClipCounts(shards)
        self._cluster = ray_cluster(setup.config.ray)

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ValueError: Ray is not installed, no cluster at the address, or no GPU in it though
                `extract.device` names one.
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
    ) -> EngineReport:
        """Write one extraction's stores, but for shards that other processes are writing.

        Raises:
            RuntimeError: Workers kept dying.
            Exception: What stopped a worker; the others are stopped too.
        """
        setup = self._setup.for_stores(
            {kind: settings.hash for kind, settings in extraction.settings.items()},
            extraction.size,
        )
        report = EngineReport()
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
    """A worker, and what it was asked to do last."""

    actor: Any
    answer: Any
    job: ShardJob | None = None
    """None while it starts."""
    unanswered_since: float | None = None
    """When it was first asked without an answer."""


class _WorkerPool:
    """The workers, started as they are needed and replaced when they die."""

    def __init__(
        self, ray: Any, setup: WorkerSetup, bar: JobsBar, report: EngineReport, progress: Progress
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
        """Have every job done, but those that processes outside this run are at."""
        queue = deque(jobs)
        while queue or any(worker.job for worker in self._workers):
            self._spawn(len(queue))
            answers = {worker.answer: worker for worker in self._workers}
            ready, _ = self._ray.wait(list(answers), timeout=_POLL_S)
            for answer in ready:
                self._on_result(answers[answer], queue)
            if not ready:
                self._poll_progress(queue)
                self._log_when_idle()

    def shutdown(self) -> None:
        """End every worker."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []

    def _spawn(self, queue: int) -> None:
        resources = self._ray.cluster_resources()
        config = self._setup.config
        gpus = 0 if config.device == "cpu" else int(resources.get("GPU", 0))
        wanted = config.ray.workers or max(1, gpus)
        working = sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(wanted, queue + working):
            worker = self._ray.remote(concurrency_groups={"report": 1})(RayWorker)
            actor = worker.options(num_cpus=1, num_gpus=1 if gpus else 0).remote(self._setup)
            self._workers.append(_Worker(actor, actor.prepare.remote()))

    def _on_result(self, worker: _Worker, queue: deque[ShardJob]) -> None:
        """Take a worker's answer, and give it the next job."""
        errors, job = self._ray.exceptions, worker.job
        try:
            answer = self._ray.get(worker.answer)
        except errors.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error  # with the worker's traceback
            raise
        except errors.RayError as error:
            self._on_death(worker, str(error))
            if job is not None:
                queue.append(job)
            return
        if job is None:
            self._deaths[_STARTING] = 0
            self._progress.log(f"ray: {answer} is ready")
        else:
            self._show(job, answer.clips, answer.lines)
            if answer.written is not None:
                self._report.written += answer.written
                self._report.captions_cut += answer.captions_cut
                self._report.settled_jobs |= answer.settled_jobs
                self._report.changed_shards |= answer.changed_shards
                self._bar.done(job)
        worker.job = queue.popleft() if queue else None
        if worker.job is None:
            self._workers.remove(worker)
            self._ray.kill(worker.actor)
        else:
            worker.unanswered_since = None
            worker.answer = worker.actor.work.remote(worker.job)

    def _on_death(self, worker: _Worker, why: str) -> None:
        self._workers.remove(worker)
        # It may only be out of reach; it must not go on beside the one that takes its place.
        self._ray.kill(worker.actor)
        what = f"shard {worker.job.name!r}" if worker.job else _STARTING
        self._deaths[what] += 1
        first_line = why.strip().partition("\n")[0]
        restarts = self._setup.config.ray.restarts
        if self._deaths[what] > restarts:
            raise RuntimeError(
                f"{self._deaths[what]} workers in a row died on {what} (extract.ray.restarts="
                f"{restarts}): {first_line} Their memory is the usual suspect; ray logs has more. "
                "What they had finished is kept"
            )
        self._progress.log(f"ray: a worker died on {what}, another one takes over: {first_line}")

    def _poll_progress(self, queue: deque[ShardJob]) -> None:
        """Show how far the workers are, and give the shards of those that do not say to others."""
        working = {m.actor.report.remote(): m for m in self._workers if m.job is not None}
        if not working:
            return
        ready, unanswered = self._ray.wait(list(working), num_returns=len(working), timeout=_POLL_S)
        now = time.monotonic()
        for question in unanswered:
            worker = working[question]
            if worker.unanswered_since is None:
                worker.unanswered_since = now
            elif now - worker.unanswered_since > REPORT_TIMEOUT_S and worker.job is not None:
                queue.append(worker.job)
                self._on_death(worker, f"it has not answered for {REPORT_TIMEOUT_S:g} s.")
        for answer in ready:
            working[answer].unanswered_since = None
            job = working[answer].job
            try:
                found = self._ray.get(answer)
            except self._ray.exceptions.RayError:
                continue  # its work's answer tells
            if job is not None and found.job == job.name:
                self._show(job, found.clips, found.lines)

    def _show(self, job: ShardJob, clips: int, lines: Sequence[str]) -> None:
        """Count what is new: a job that a second worker goes through again is counted once."""
        self._bar.advance(job, max(0, clips - self._clips_shown[job.name]))
        self._clips_shown[job.name] = max(clips, self._clips_shown[job.name])
        for line in lines:
            self._progress.log(line)

    def _log_when_idle(self) -> None:
        working = any(worker.job for worker in self._workers)
        self._idle_polls = 0 if working else self._idle_polls + 1
        if self._idle_polls == _IDLE_POLLS:
            self._progress.log(
                "ray: no worker has started yet; each asks for one CPU, and one GPU where the "
                f"cluster has some. The cluster has {self._ray.cluster_resources()}"
            )
