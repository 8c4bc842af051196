"""Loading checkpoints without executing code from them.

Checkpoint files are pickles, which can name any function to be called on load. torch's
`weights_only` loads only tensors, plain values and allow-listed classes.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stages.train_student.parallel.deepspeed import import_deepspeed

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_NO_WEIGHTS_ONLY = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variables that torch.load reads on every call."""


@contextmanager
def deepspeed_loads_weights_only() -> Iterator[None]:
    """Context manager: torch.load reads only tensors, plain values and three DeepSpeed classes.

    DeepSpeed calls torch.load with `weights_only=False`; torch's environment variable overrides
    that. The classes are those found in DeepSpeed's checkpoints.

    Raises:
        ValueError: a file names anything else; none of its code was executed.
    """
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [LossScaler, ZeroStageEnum, fragment_address]
    before = {name: os.environ.pop(name, None) for name in (_WEIGHTS_ONLY, _NO_WEIGHTS_ONLY)}
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with refuse_unsafe_pickles(), torch.serialization.safe_globals(classes):
            yield
    finally:
        del os.environ[_WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def refuse_unsafe_pickles() -> Iterator[None]:
    """Context manager: explain why `weights_only` refuses a file (`ValueError`)."""
    try:
        yield
    except pickle.UnpicklingError as error:
        # torch's own message mostly advises how to load the file anyway.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {named.group(1)}" if named else f"is not a checkpoint ({error})"
        raise ValueError(
            f"a file of the checkpoint {what}, unlike any file that this software writes: it could "
            "execute code, and was not loaded. Use another checkpoint, from a source you trust"
        ) from error
