"""Ways to spoil a step of a training, and to leave one out; tests and their processes use them.

Each returns what to put in place of the original, by its full name; `spoil` puts it there.
"""

import os
import signal
from dataclasses import replace

import torch


def spoiled_samples(read, numbers):
    """`CachedSamples.__getitem__` whose samples of these numbers have an infinite loss."""

    def read_spoiled(self, sample):
        batch = read(self, sample)
        return replace(batch, clean_BFCHW=batch.clean_BFCHW / 0) if sample in numbers else batch

    return read_spoiled


def spoiled_gradients(call, step_to_spoil):
    """`TrainingStep.__call__` with a finite loss and a gradient that is not, at one step."""

    def call_spoiled(self, student, batch, step):
        losses = call(self, student, batch, step)
        if step == step_to_spoil:
            losses.total.register_hook(lambda gradient: gradient * torch.nan)
        return losses

    return call_spoiled


def step_left_out(make_step, left_out):
    """`_train_step` that does nothing at one step (from 0) but move on in the data and schedule."""
    from stages.train_student.logging.rows import PerformanceRow, StepRows

    def step_or_nothing(run, engine, training_step, batches, step, *others):
        if step != left_out:
            return make_step(run, engine, training_step, batches, step, *others)
        for _ in range(run.accumulation):
            next(batches)
        engine.lr_scheduler.step()
        row = PerformanceRow(
            step=step + 1,
            seconds=1.0,
            wait_seconds=0.0,
            clips_per_second=1.0,
            peak_memory_bytes=1,
            share_of_peak=None,
        )
        return StepRows(performance=row, losses=None, skipped=None, damaged=()), False

    return step_or_nothing


def asked_to_stop(make_step, step_to_stop, number=signal.SIGTERM):
    """`_train_step` in which this process gets a signal at one step (from 0)."""

    def step_and_signal(run, engine, training_step, batches, step, *others):
        if step == step_to_stop:
            os.kill(os.getpid(), number)
        return make_step(run, engine, training_step, batches, step, *others)

    return step_and_signal


def loader_that_dies(read, rank, at, number):
    """`CachedSamples.__getitem__` that signals the process that reads one rank's sample."""

    def read_or_die(self, sample):
        if sample == at and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)
        return read(self, sample)

    return read_or_die


def spoil(fault):
    """Spoil this process's training: `spoil sample NUMBER`, `leave out step INDEX`,
    `ask rank RANK to stop at INDEX`, `kill` or `stop loader of rank RANK at sample NUMBER`.
    """
    from stages.train_student import train
    from stages.train_student.data import loader
    from stages.train_student.data.dataset import CachedSamples

    numbers = [int(word) for word in fault.split() if word.isdigit()]
    if fault.startswith("spoil sample"):
        CachedSamples.__getitem__ = spoiled_samples(CachedSamples.__getitem__, numbers)
    elif fault.startswith("leave out step"):
        train._train_step = step_left_out(train._train_step, *numbers)
    elif fault.startswith("ask rank"):
        rank, step = numbers
        if os.environ["RANK"] == str(rank):
            train._train_step = asked_to_stop(train._train_step, step)
    elif fault.startswith(("kill loader", "stop loader")):
        number = signal.SIGKILL if fault.startswith("kill") else signal.SIGSTOP
        CachedSamples.__getitem__ = loader_that_dies(CachedSamples.__getitem__, *numbers, number)
        loader.SILENCE_PER_CLIP_S = 3.0
    else:
        raise ValueError(fault)
