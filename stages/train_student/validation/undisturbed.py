"""Looking at the student without leaving a trace in its training; losses and samples use it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(student: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and random numbers go on as before.

    Gradient checkpointing rests meanwhile: it is for passes with gradients.
    """
    modules = [module for module in student.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        student.eval()
        try:
            yield
        finally:
            for module in modules:
                module.training = True
            random.setstate(of_python)
            np.random.set_state(of_numpy)
