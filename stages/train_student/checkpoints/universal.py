"""Checkpoints that any number of processes can load: DeepSpeed's universal ones.

    <run_dir>/checkpoints/universal/
        checkpoint-500/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt
        checkpoint-500/*_model_states.pt
        checkpoint-500.complete.json     written last

Made from a checkpoint when a run goes on with another number of processes, kept for another start
with that number, and dropped with the checkpoint. Resuming uses this.
"""

import contextlib
import io
import shutil
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from stages.file_checksums import checksum_of, files_below
from stages.train_student.checkpoints.eight_bit import with_float32_moments
from stages.train_student.checkpoints.records import (
    UNIVERSAL,
    Checkpoint,
    read_record,
    record_of,
    sync_tree,
    write_record,
)
from stages.train_student.checkpoints.unpickling import deepspeed_loads_weights_only
from stages.train_student.deepspeed_library import import_deepspeed


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
