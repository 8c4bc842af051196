"""Step time, time spent waiting for data, peak memory, and FLOP/s relative to the GPU's peak."""

import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from stages.clips.config import ClipsConfig
from stages.compute_cost.gpus import local_gpu
from stages.progress import Progress
from stages.students.student import StudentConfigs
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch
from stages.train_student.data.stores import JoinedStores
from stages.train_student.logging.rows import PerformanceRow
from stages.train_student.parallel.process_group import World
from stages.train_student.step_costs import step_cost

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRate:
    """FLOPs of a batch, and the device's peak FLOP/s."""

    flops_per_clip: Mapping[tuple[int, int, int], float]
    """FLOPs of a forward and backward pass, without recomputation; by latent frames (with padding),
    latent height and latent width."""
    peak_flops: float
    """Peak FLOP/s from the device's data sheet."""

    def model_flops(self, batch: Batch) -> float | None:
        """FLOPs of a batch; None for a size whose cost is unknown."""
        clips, frames, _, height, width = batch.clean_BFCHW.shape
        per_clip = self.flops_per_clip.get((frames, height, width))
        return None if per_clip is None else clips * per_clip


class StepClock:
    """Timer of one step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._wait_seconds = 0.0
        self._flops: float | None = 0.0

    def next(self, batches: Iterator[T]) -> T:
        """Return the next batch, and time the wait for it."""
        start = time.perf_counter()
        batch = next(batches)
        self._wait_seconds += time.perf_counter() - start
        return batch

    def add_flops(self, flops: float | None) -> None:
        """Add the FLOPs of a micro-batch on this rank; None if unknown."""
        self._flops = None if self._flops is None or flops is None else self._flops + flops

    def row(
        self, step: int, *, clips: int, world: World, peak_flops: float | None, stop: bool
    ) -> tuple[PerformanceRow, bool]:
        """End the step; every rank must call this.

        Args:
            clips: clips of the whole batch.
            peak_flops: peak FLOP/s of this rank's device; None if unknown.
            stop: whether this process was asked to stop.

        Returns:
            The row, and whether any process was asked to stop.
        """
        mine = [self._wait_seconds, float(peak_memory_bytes()), float(stop)]
        if world.size > 1:
            maxima = torch.tensor(mine, dtype=torch.float64, device=world.device)
            # Waits for the slowest rank, so all ranks measure the same time.
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
            mine = maxima.tolist()
        wait, memory, any_stop = mine
        seconds = time.perf_counter() - self._start
        share = None
        if peak_flops is not None and self._flops is not None:
            share = self._flops / seconds / peak_flops
        row = PerformanceRow(
            step=step,
            seconds=seconds,
            wait_seconds=min(wait, seconds),
            clips_per_second=clips / seconds,
            peak_memory_bytes=int(memory),
            share_of_peak=share,
        )
        return row, bool(any_stop)


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU if there is one, otherwise of the host."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_rate(
    config: TrainConfig,
    configs: StudentConfigs,
    stores: Iterable[tuple[ClipsConfig, JoinedStores]],
    progress: Progress,
) -> DeviceRate | None:
    """Compute the FLOPs of clips of each size; None if this device's peak FLOP/s is unknown.

    An error here is logged, and does not stop training.
    """
    gpu = local_gpu()
    if gpu is None:
        return None
    flops = {}
    try:
        for size, joined in stores:
            frames = size.num_latent_frames + configs.padding(size.num_latent_frames)
            flops[frames, *size.latent_size] = step_cost(
                config,
                configs,
                size,
                teacher=None if joined.teacher is None else joined.teacher.settings,
                visual=None if joined.visual is None else joined.visual.settings,
                masks=None if joined.masks is None else joined.masks.settings,
            ).model_flops_per_clip
    except Exception as error:
        progress.log(f"the share of {gpu.name}'s peak FLOP/s will not be logged: {error}")
        return None
    peak = gpu.bf16_flops if config.deepspeed.precision == "bf16" else gpu.fp32_flops
    return DeviceRate(flops_per_clip=flops, peak_flops=peak)
