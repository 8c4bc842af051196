"""One extraction in a run: its stores, its jobs and what they did."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cache_schema import StoreWriter
from stages.extract_features.config import Kind
from stages.extract_features.execution.jobs import JobPlan, JobReport, ShardJob, pending_jobs
from stages.extract_features.execution.local_engine import LocalEngine, wait_for_others
from stages.extract_features.execution.ray_engine import RayEngine
from stages.extract_features.extraction import Extraction
from stages.progress import Progress


class ExtractionTask:
    """One extraction in a run, and its results."""

    writers: Mapping[Kind, StoreWriter]

    def __init__(self, extraction: Extraction) -> None:
        self.extraction = extraction
        self.report = JobReport()
        self.seconds = 0.0
        self.plan = JobPlan(jobs=(), num_settled=0)

    def run(self, engine: RayEngine | LocalEngine, progress: Progress) -> None:
        """Run the pending jobs, unless other processes are writing all of them."""
        started = time.perf_counter()
        pending = pending_jobs(self._unsettled_jobs(), self.writers)
        if not all(map(self._is_busy, pending)):
            self.report.add(engine.run(self.extraction, self.writers, self.plan, progress))
            self.plan = replace(self.plan, jobs=self._unsettled_jobs())
        self.seconds += time.perf_counter() - started

    def unfinished(self) -> dict[str, bool]:
        """Return the unfinished shards, and whether another process is writing each."""
        self.plan = replace(self.plan, jobs=pending_jobs(self._unsettled_jobs(), self.writers))
        kinds = " and ".join(self.writers)
        return {f"{kinds} {job.name}": self._is_busy(job) for job in self.plan.jobs}

    def _unsettled_jobs(self) -> list[ShardJob]:
        return [job for job in self.plan.jobs if job.name not in self.report.settled_jobs]

    def _is_busy(self, job: ShardJob) -> bool:
        return any(self.writers[kind].is_busy(job.name) for kind in job.keys)


def run_tasks(
    tasks: Sequence[ExtractionTask], engine: RayEngine | LocalEngine, progress: Progress
) -> None:
    """Run the jobs of all tasks; wait for shards that other processes write, or take them over."""

    def unfinished() -> dict[str, bool]:
        return {name: busy for task in tasks for name, busy in task.unfinished().items()}

    while True:
        for task in tasks:
            task.run(engine, progress)
        wait_for_others(unfinished, progress)
        if not unfinished():
            return
