"""AdamW optimizers and the learning-rate schedule."""

import importlib.util
import math
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from stages.train_student.config import OptimizerConfig, TrainConfig

INSTALL_8BIT = "pip install 'sam2videox[adamw8bit]'"


def check_optimizer(config: OptimizerConfig) -> None:
    """Reject an optimizer whose package is missing, without importing it.

    Raises:
        ValueError: names the command that installs the package.
    """
    if config.name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "train.optimizer.name adamw8bit needs bitsandbytes, which is not installed; run "
            f"{INSTALL_8BIT}, or set train.optimizer.name to adamw"
        )


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: OptimizerConfig, *, in_host_memory: bool
) -> torch.optim.Optimizer:
    """Build AdamW over `parameters`, with moments in float32 or in 8 bits.

    float32: torch's AdamW, since DeepSpeed's would be compiled on first use. 8 bits: that of
    bitsandbytes, in which blocks of 256 values share a scale (Dettmers et al., "8-bit Optimizers
    via Block-wise Quantization") and tensors under 4096 values keep float32 moments. torchao's
    falls back to float32 for tensors that are not a multiple of its block size, which ZeRO's flat
    shards rarely are.

    Args:
        in_host_memory: the optimizer's tensors are offloaded to the CPU; the fused update is then
            used, which makes one pass over memory.
    """
    if config.name == "adamw8bit":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns about every missing GPU library
            from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True if in_host_memory else None,
    )


def learning_rate_factor(step: int, config: OptimizerConfig, steps: int) -> float:
    """Fraction of the peak rate at `step` (from 0) of `steps`: linear warm-up, then schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def describe_new_length(config: TrainConfig, done: int, planned: int) -> str:
    """Log message: effect of a changed `train.steps` on the run's schedules.

    Args:
        config: settings with the new number of steps.
        done: completed steps.
        planned: previous number of steps.
    """
    optimizer, steps = config.optimizer, config.steps
    before, now = (
        optimizer.learning_rate * learning_rate_factor(done, optimizer, length)
        for length in (planned, steps)
    )
    if optimizer.schedule == "constant":
        rate = f"the learning rate stays as it is, {now:.3g} at step {done + 1}"
    else:
        rate = (
            f"the learning rate falls to zero over {steps} steps as if planned so from the start, "
            f"{now:.3g} at step {done + 1} instead of {before:.3g}"
        )
    decaying = [
        name for name in config.objectives if config.settings_of(name).schedule != "constant"
    ]
    weights = f"; so does the weight of {' and '.join(decaying)}" if decaying else ""
    return f"train.steps is {steps}, was {planned}: {rate}{weights}"
