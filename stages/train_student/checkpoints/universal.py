"""Checkpoints that any number of processes can load: DeepSpeed's universal ones.

    <run_dir>/checkpoints/universal/
        checkpoint-500/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt
        checkpoint-500/*_model_states.pt
        checkpoint-500.complete.json     written last

Made from a checkpoint when a run resumes on another number of processes, kept for further starts on
that number, and removed with the checkpoint.

Universal checkpoints hold float32 moments only, so the moments of 8-bit AdamW are converted and
back. bitsandbytes keeps `state1` and `state2`, bytes that index the tables `qmap1` and `qmap2`, and
a scale per block of 256, `absmax1` and `absmax2`; small tensors stay float32. Blocks are those of a
rank's partition, so another number of processes quantises anew.
"""

import contextlib
import io
import shutil
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.files.checksums import checksum_of, files_below
from stages.train_student.checkpoints.records import (
    UNIVERSAL,
    Checkpoint,
    read_record,
    record_of,
    sync_tree,
    write_record,
)
from stages.train_student.checkpoints.unpickling import deepspeed_loads_weights_only
from stages.train_student.parallel.deepspeed import import_deepspeed

_BLOCK = 256
_MOMENTS = {"exp_avg": ("1", "dynamic"), "exp_avg_sq": ("2", "udynamic")}
_STATES_OF_A_RANK = "*_optim_states.pt"


def is_eight_bit(optimizer: Any) -> bool:
    """Whether this is bitsandbytes' optimiser."""
    return hasattr(optimizer, "name2qmap")


def with_float32_moments(source: Path, work: Path) -> Path:
    """The checkpoint in `source`, as a copy in the empty folder `work` if its moments are bytes."""
    files = sorted(source.glob(_STATES_OF_A_RANK))
    first = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
    if not any(_packed(state) for state in _states(first)):
        return source
    for path in source.glob("*_model_states.pt"):
        (work / path.name).symlink_to(path.resolve())
    for path in files:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for state in _states(content):
            _unpack(state)
        torch.save(content, work / path.name)
    return work


def quantize_moments(engine: Any) -> None:
    """Turn the float32 moments that a universal checkpoint brought into the optimiser's bytes."""
    from bitsandbytes.functional import quantize_blockwise

    optimizer = engine.optimizer.optimizer
    for parameter, state in optimizer.state.items():
        for moment, (number, table) in _MOMENTS.items():
            value = state.pop(moment)
            if parameter.numel() < optimizer.args.min_8bit_size:
                state[f"state{number}"] = value
                continue
            code = optimizer.name2qmap[table].to(value.device)
            indices, about = quantize_blockwise(value, code=code, blocksize=_BLOCK)
            state[f"state{number}"] = indices
            state[f"qmap{number}"] = code
            state[f"absmax{number}"] = about.absmax
    for parameter in engine.module.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.optim_fragment = None  # views of the float32 moments


def _states(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of each flat tensor in a rank's file; ZeRO 3 calls them otherwise."""
    zero = content["optimizer_state_dict"]
    states = zero.get("base_optimizer_state", zero.get("optimizer_state_dict"))["state"]
    return list(states.values())


def _packed(state: dict[str, Any]) -> dict[str, Any]:
    """What bitsandbytes hides in a dictionary of its own."""
    return next((value for value in state.values() if isinstance(value, dict)), {})


def _unpack(state: dict[str, Any]) -> None:
    packed = _packed(state)
    step = state["step"]
    state.clear()
    state["step"] = step
    for moment, (number, _) in _MOMENTS.items():
        state[moment] = _float32(packed, number)


def _float32(packed: dict[str, Tensor], number: str) -> Tensor:
    value = packed[f"state{number}"]
    if value.dtype == torch.float32:
        return value
    flat = packed[f"qmap{number}"][value.flatten().int()]
    scale = packed[f"absmax{number}"].repeat_interleave(_BLOCK)[: flat.numel()]
    return (flat * scale).reshape(value.shape)


def universal_folder(checkpoint: Checkpoint) -> Path:
    """Where the checkpoint's universal copy lies, if it was made."""
    return checkpoint.folder.parent / UNIVERSAL / checkpoint.folder.name


def universal_copy(checkpoint: Checkpoint) -> Path:
    """The folder of the checkpoint's complete universal copy, made unless it is there already."""
    copy = universal_folder(checkpoint)
    if read_record(copy) is not None:
        return copy
    record_of(copy).unlink(missing_ok=True)
    if copy.is_dir():
        shutil.rmtree(copy)
    copy.mkdir(parents=True)
    with (
        tempfile.TemporaryDirectory(dir=copy.parent, prefix=".float32-") as work,
        deepspeed_loads_weights_only(),
    ):
        _convert(with_float32_moments(checkpoint.folder, Path(work)), copy)
    sync_tree(copy)
    files = {name: checksum_of(path) for name, path in files_below(copy).items()}
    write_record(replace(checkpoint, folder=copy, files=files))
    return copy


def _convert(source: Path, target: Path) -> None:
    import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    settings = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: others would load everything anew
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ZeRO 1 and 2 expect a note on how tensors were split: nohow
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)
    (target.parent / "latest_universal").unlink(missing_ok=True)  # the record takes its place
