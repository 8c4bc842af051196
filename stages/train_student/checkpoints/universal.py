"""DeepSpeed universal checkpoints, which any number of processes can load.

    <run_dir>/checkpoints/universal/
        checkpoint-500/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt
        checkpoint-500/*_model_states.pt
        checkpoint-500.complete.json     written last

Converted from a checkpoint when a run resumes with another number of processes, kept for further
starts, and removed with the checkpoint.

Universal checkpoints hold float32 moments only, so the moments of 8-bit AdamW are dequantised, and
quantised again after loading. bitsandbytes stores `state1` and `state2`, bytes that index the
tables `qmap1` and `qmap2`, and a scale per block of 256, `absmax1` and `absmax2`; small tensors
stay float32. Blocks are those of a rank's partition, so they change with the number of processes.
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

from stages.files.checksums import checksum_of, files_below
from stages.train_student.checkpoints.records import (
    Checkpoint,
    read_record,
    record_path,
    sync_tree,
    universal_folder,
    write_record,
)
from stages.train_student.parallel.deepspeed import (
    deepspeed_loads_weights_only,
    import_deepspeed,
)

_BLOCK = 256
_MOMENTS = {"exp_avg": ("1", "dynamic"), "exp_avg_sq": ("2", "udynamic")}
_OPTIMIZER_FILES = "*_optim_states.pt"


def is_eight_bit(optimizer: Any) -> bool:
    """Whether this is a bitsandbytes optimiser."""
    return hasattr(optimizer, "name2qmap")


def with_float32_moments(source: Path, work: Path) -> Path:
    """Return `source`, or if its moments are 8-bit, a float32 copy in the empty folder `work`."""
    files = sorted(source.glob(_OPTIMIZER_FILES))
    first = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
    if not any(_bitsandbytes_state(state) for state in _states(first)):
        return source
    for path in source.glob("*_model_states.pt"):
        (work / path.name).symlink_to(path.resolve())
    for path in files:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for state in _states(content):
            _dequantize(state)
        torch.save(content, work / path.name)
    return work


def quantize_moments(engine: Any) -> None:
    """Quantise the float32 moments loaded from a universal checkpoint."""
    from bitsandbytes.functional import quantize_blockwise

    optimizer = engine.optimizer.optimizer
    for parameter, state in optimizer.state.items():
        for moment, (number, table) in _MOMENTS.items():
            value = state.pop(moment)
            if parameter.numel() < optimizer.args.min_8bit_size:
                state[f"state{number}"] = value
                continue
            code = optimizer.name2qmap[table].to(value.device)
            indices, quantization = quantize_blockwise(value, code=code, blocksize=_BLOCK)
            state[f"state{number}"] = indices
            state[f"qmap{number}"] = code
            state[f"absmax{number}"] = quantization.absmax
    for parameter in engine.module.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.optim_fragment = None  # views of the float32 moments


def _states(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Optimiser states of each flat tensor in a rank's file; ZeRO 3 uses another key."""
    zero = content["optimizer_state_dict"]
    states = zero.get("base_optimizer_state", zero.get("optimizer_state_dict"))["state"]
    return list(states.values())


def _bitsandbytes_state(state: dict[str, Any]) -> dict[str, Any]:
    """The nested dictionary in which bitsandbytes keeps its state; empty if there is none."""
    return next((value for value in state.values() if isinstance(value, dict)), {})


def _dequantize(state: dict[str, Any]) -> None:
    packed = _bitsandbytes_state(state)
    step = state["step"]
    state.clear()
    state["step"] = step
    for moment, (number, _) in _MOMENTS.items():
        value = packed[f"state{number}"]
        if value.dtype != torch.float32:
            flat = packed[f"qmap{number}"][value.flatten().int()]
            scale = packed[f"absmax{number}"].repeat_interleave(_BLOCK)[: flat.numel()]
            value = (flat * scale).reshape(value.shape)
        state[moment] = value


def universal_copy(checkpoint: Checkpoint) -> Path:
    """Convert the checkpoint unless that was done already; returns the copy's folder."""
    copy = universal_folder(checkpoint.folder)
    if read_record(copy) is not None:
        return copy
    record_path(copy).unlink(missing_ok=True)
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
        num_extract_workers=1,  # in this process: workers would have to import everything again
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ZeRO 1 and 2 expect tensor-parallel metadata; there is none
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)
    (target.parent / "latest_universal").unlink(missing_ok=True)  # not used, as with `latest`
