"""Loading checkpoints without running code that a file of theirs names.

A checkpoint's files are pickles, which can name any function to be called while they are read.
torch's `weights_only` reads tensors, plain values and a list of classes alone.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stages.train_student.parallel.deepspeed import import_deepspeed

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ANYTHING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variables that torch.load looks at in every call."""


@contextmanager
def deepspeed_loads_weights_only() -> Iterator[None]:
    """Within the block torch.load reads tensors, plain values and DeepSpeed's own classes alone.

    DeepSpeed calls it with `weights_only=False`, which torch's environment variable overrules. The
    classes are those that its checkpoints hold.

    Raises:
        ValueError: a file names anything else; nothing of it was run.
    """
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [LossScaler, ZeroStageEnum, fragment_address]
    before = {name: os.environ.pop(name, None) for name in (_WEIGHTS_ONLY, _ANYTHING)}
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with code_refused(), torch.serialization.safe_globals(classes):
            yield
    finally:
        del os.environ[_WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def code_refused() -> Iterator[None]:
    """Say of a file that `weights_only` refuses what it names (`ValueError`)."""
    try:
        yield
    except pickle.UnpicklingError as error:
        # Most of torch's message is advice to trust the file.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {named.group(1)}" if named else f"is no checkpoint ({error})"
        raise ValueError(
            f"a file of the checkpoint {what}, as none of this software's does: it could run code, "
            "and was not loaded. Use another checkpoint, of a folder that you trust"
        ) from error
