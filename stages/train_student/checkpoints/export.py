"""Trained weights in the formats that diffusers loads: at the end of a run, or of any checkpoint.

    export/pytorch_lora_weights.safetensors   LoRA, alpha = rank: pipe.load_lora_weights(folder)
    export/transformer/                       full tuning: from_pretrained(folder / "transformer")
    export/export.json                        which step, whether the average or the last, and the
                                              size and CRC-32C of every file; `sample` checks them

`train` calls `export_weights`, the `export` command `export_checkpoint`. Where the run keeps an
average of its weights, that is what is exported, unless the last weights are asked for.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor

from stages.files.checksums import checksum_of, files_below
from stages.files.safetensors import save_tensors
from stages.files.text import read_object
from stages.files.write_errors import why_not_written
from stages.sample_videos.runs import ABOUT, LoraFormat
from stages.train_student.checkpoints.lora_formats import check_format
from stages.train_student.checkpoints.records import (
    Checkpoint,
    complete_checkpoints,
    find_damage,
    sync_tree,
)
from stages.train_student.checkpoints.weights import (
    HEADS,
    TRANSFORMER,
    CheckpointWeights,
    Weights,
    write_lora,
    write_transformer,
)
from stages.train_student.config import LoraSettings
from stages.train_student.model.lora import ADAPTER, lora_config
from stages.train_student.model.student import Student
from stages.train_student.parallel.deepspeed import gathered
from stages.train_student.parallel.ema import SavedAverage, WeightAverage
from stages.train_student.parallel.process_group import World, barrier, on_first_rank

EXPORT_FOLDER = "export"
Which = Literal["average", "last"]
"""The running average of the weights, or the weights after the last step."""

_ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """What was exported, and where to."""

    folder: Path
    method: Literal["lora", "full"]
    step: int
    weights: Which
    form: LoraFormat
    parameters: int


def export_weights(
    student: Student,
    run_dir: Path,
    world: World,
    *,
    step: int,
    average: WeightAverage | None,
    check: Callable[[], None],
) -> Path:
    """Write the export and the heads of a run; every rank must call this, rank 0 writes.

    The folder is replaced by one rename. One weight at a time is made whole, and rank 0 holds those
    of one file.

    Args:
        student: as it is trained.
        run_dir: folder of the run; its `heads.safetensors` gets what was trained beside.
        world: this process among all.
        step: how many steps were made.
        average: what is exported in place of the last weights.
        check: called on rank 0 before anything is removed or put in its place; raises if the folder
            may be another process's.

    Returns:
        The export's folder.
    """
    folder = run_dir / EXPORT_FOLDER
    which: Which = "last" if average is None else "average"
    configs: Mapping[str, LoraConfig] = getattr(student.transformer, "peft_config", {})
    on_first_rank(world, check)
    with _live(student, average, run_dir, world) as weights:
        settings = dict(student.transformer.config)
        adapter = configs.get(ADAPTER)
        _write(weights, adapter, settings, folder, world, step=step, which=which, check=check)
        heads = weights.read_all(HEADS, world)

        def save_heads() -> None:
            check()
            save_tensors(heads, run_dir / "heads.safetensors")

        if weights.within(HEADS):
            on_first_rank(world, save_heads)
    return folder


def export_checkpoint(
    run_dir: Path,
    step: int | None,
    out: Path | None,
    *,
    which: Which | None = None,
    form: LoraFormat = "diffusers",
) -> ExportSummary:
    """Write what `export_weights` would have written after another step; one process does it.

    Args:
        run_dir: folder of the run, finished or not.
        step: of a complete checkpoint; None takes the newest.
        out: folder to write; None takes the run's own export/ for the newest checkpoint, and
            export-STEP/ for one that is named; -FORM is appended for another form than diffusers'.
        which: None takes the average where the run keeps one.
        form: key form of adapters.

    Raises:
        ValueError: there is no such run or complete checkpoint, the checkpoint is damaged, no
            average, a form that cannot hold what was trained, or `out` holds something else than an
            export.
    """
    settings = _settings(run_dir)
    checkpoint = _complete(run_dir, step)
    out = out or run_dir / _folder_name(step, form)
    which = which or ("last" if settings.get("train.ema.decay") is None else "average")
    lora = None
    if settings["train.method"] == "lora":
        lora = lora_config(LoraSettings(**_section(settings, "train.lora.")))
        check_format(form, dora=lora.use_dora)
    elif form != "diffusers":
        raise ValueError(
            f"{run_dir} tuned the whole transformer, and --format {form} is a form of adapters; a "
            "whole transformer is exported for diffusers alone"
        )
    with _stored(checkpoint, settings, which) as weights:
        transformer = _section(settings, "transformer.")
        _write(
            weights,
            lora,
            transformer,
            out,
            _ALONE,
            step=checkpoint.step,
            which=which,
            form=form,
        )
        parameters = _number_of(weights, lora is not None)
    return ExportSummary(
        folder=out,
        method="full" if lora is None else "lora",
        step=checkpoint.step,
        weights=which,
        form=form,
        parameters=parameters,
    )


def _write(
    weights: Weights,
    lora: LoraConfig | None,
    transformer: Mapping[str, Any],
    folder: Path,
    world: World,
    *,
    step: int,
    which: Which,
    form: LoraFormat = "diffusers",
    check: Callable[[], None] = lambda: None,
) -> None:
    """Replace `folder` by an export of `weights`; it is whole or not there."""
    partial = folder.with_name(f".{folder.name}.partial")

    def begin() -> None:
        check()
        _refuse_what_is_no_export(folder)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "transformer" if lora is None else partial).mkdir(parents=True)

    def finish() -> None:
        files = {name: asdict(checksum_of(path)) for name, path in files_below(partial).items()}
        about = {"step": step, "weights": which, "files": files}
        (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        sync_tree(partial)
        check()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    try:
        on_first_rank(world, begin)
        if lora is None:
            write_transformer(weights, transformer, partial / "transformer", world)
        else:
            write_lora(weights, lora, partial, world, form)
        on_first_rank(world, finish)
    except (OSError, SafetensorError) as error:
        if (why := why_not_written(error, folder)) is None:
            raise
        raise OSError(f"the export {folder} could not be written: {why}") from error
    barrier(world)


@contextmanager
def _live(
    student: Student, average: WeightAverage | None, run_dir: Path, world: World
) -> Iterator[Weights]:
    """The trained weights of a student in memory, or their average."""
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    buffers = {}
    if not hasattr(student.transformer, "peft_config"):
        trained = dict(student.transformer.named_parameters())
        state = student.transformer.state_dict()
        buffers = {TRANSFORMER + name: v for name, v in state.items() if name not in trained}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    shapes |= {name: tuple(value.shape) for name, value in buffers.items()}
    dtype = next(iter(parameters.values())).dtype

    def read(name: str) -> Tensor | None:
        if name in buffers:
            return buffers[name].cpu().clone()
        parameter = parameters[name]
        with gathered([parameter]):
            return parameter.detach().cpu().clone() if world.is_first else None

    weights = Weights(shapes=shapes, dtype=dtype, read=read)
    if average is None:
        yield weights
        return
    shares = run_dir / ".average.partial"
    on_first_rank(world, lambda: _make_empty(shares))
    average.save(shares)
    barrier(world)
    try:
        if world.is_first:
            with SavedAverage(shares, world.size) as saved:
                yield _averaged(weights, saved)
        else:
            # No other rank is needed to read the average: only what is not in it is walked through.
            yield Weights(shapes=shapes, dtype=dtype, read=lambda name: None)
    finally:
        if world.is_first:
            shutil.rmtree(shares, ignore_errors=True)


@contextmanager
def _stored(checkpoint: Checkpoint, settings: Mapping[str, Any], which: Which) -> Iterator[Weights]:
    """The trained weights of a checkpoint, or their average."""
    bf16 = settings["train.deepspeed.precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    stored = CheckpointWeights(checkpoint, dtype, weights_needed=which == "last")
    shapes = {name: stored.shape(name) for name in stored.names}
    weights = Weights(shapes=shapes, dtype=dtype, read=stored.read)
    if which == "last":
        yield weights
        return
    with SavedAverage(checkpoint.folder, checkpoint.world_size) as saved:
        yield _averaged(weights, saved)


def _averaged(weights: Weights, saved: SavedAverage) -> Weights:
    """The average where there is one; buffers, which are not trained, as they are."""

    def read(name: str) -> Tensor | None:
        if name not in saved:
            return weights.read(name)
        shape = weights.shapes[name]
        return saved.read(name, 0, torch.Size(shape).numel()).view(shape).to(weights.dtype)

    return Weights(shapes=weights.shapes, dtype=weights.dtype, read=read)


def _settings(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "run.json"
    if not file.is_file():
        raise ValueError(f"there is no run at {run_dir}; name the folder of one with --run")
    settings: dict[str, Any] = read_object(file, settings=dict)["settings"]
    return settings


def _folder_name(step: int | None, form: LoraFormat) -> str:
    name = EXPORT_FOLDER if step is None else f"{EXPORT_FOLDER}-{step}"
    # The run's own export is what `sample` reads.
    return name if form == "diffusers" else f"{name}-{form}"


def _number_of(weights: Weights, adapters_only: bool) -> int:
    names = weights.within(TRANSFORMER)
    chosen = [name for name in names if not adapters_only or ".lora_" in name]
    return sum(torch.Size(weights.shapes[name]).numel() for name in chosen)


def _section(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}


def _complete(run_dir: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest, with all its files sound.

    One that was not written to the end is none; a damaged newest one is an error, since an export
    of an earlier step is not what was asked for.
    """
    complete = complete_checkpoints(run_dir / "checkpoints")
    if not complete:
        raise ValueError(
            f"{run_dir} has no complete checkpoint; let the run reach one (train.checkpoint_every)"
        )
    steps = ", ".join(str(checkpoint.step) for checkpoint in complete)
    for checkpoint in complete:
        if step in (None, checkpoint.step):
            damage = find_damage(checkpoint, _ALONE)
            if damage is None:
                return checkpoint
            raise ValueError(
                f"{checkpoint.folder} is damaged: {damage}; restore it from a copy, or name "
                f"another with --checkpoint, of those of {steps}"
            )
    raise ValueError(
        f"{run_dir} has no complete checkpoint of step {step}; complete are those of {steps}"
    )


def _refuse_what_is_no_export(folder: Path) -> None:
    if folder.exists() and not (folder / ABOUT).is_file():
        raise ValueError(f"{folder} is there already and is no export; name another folder")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
