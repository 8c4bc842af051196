"""Export of trained weights in formats that diffusers loads, from a run or any checkpoint.

    export/pytorch_lora_weights.safetensors   LoRA, alpha = rank: pipe.load_lora_weights(folder)
    export/transformer/                       full tuning: from_pretrained(folder / "transformer")
    export/export.json                        step, EMA ("average") or last weights, which of two
                                              transformers they are of (Wan 2.2 A14B), and the size
                                              and CRC-32C of every file, verified on sampling

The low-noise transformer of Wan 2.2 A14B loads with
pipe.load_lora_weights(folder, load_into_transformer_2=True), or as its transformer_2.

If the run keeps an EMA of its weights, the EMA is exported, unless the last weights are requested.
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

from stages.config import Expert
from stages.files.checksums import checksum_of, files_below
from stages.files.tensor_files import save_tensors, write_error_reason
from stages.files.text import read_object
from stages.sample_videos.runs import ABOUT, EXPERT_SETTING, TRANSFORMER_CLASS, LoraFormat
from stages.train_student.checkpoints.best import best_step
from stages.train_student.checkpoints.lora_formats import check_format
from stages.train_student.checkpoints.records import (
    Checkpoint,
    checkpoints_of,
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
from stages.train_student.parallel.deepspeed import gathered_parameters
from stages.train_student.parallel.ema import SavedAverage, WeightAverage
from stages.train_student.parallel.process_group import World, barrier, on_first_rank

EXPORT_FOLDER = "export"
Which = Literal["average", "last"]
"""The EMA of the weights, or the weights after the last step."""

_SINGLE_PROCESS = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """Outcome of an export."""

    folder: Path
    method: Literal["lora", "full"]
    step: int
    weights: Which
    form: LoraFormat
    transformer: str
    """Class of the transformer in diffusers."""
    parameters: int
    expert: Expert | None = None
    """Which of two transformers it is; None if the base model has one."""


def export_weights(
    student: Student,
    run_dir: Path,
    world: World,
    *,
    step: int,
    average: WeightAverage | None,
    check: Callable[[], None],
    expert: Expert | None = None,
) -> Path:
    """Write the export and the heads of a run; every rank must call this, rank 0 writes.

    The export is written to a temporary folder, which then replaces the old one by a rename.
    Weights are gathered one at a time, and rank 0 holds those of one file in memory.

    Args:
        student: the student, as wrapped by the engine.
        run_dir: folder of the run; the heads go to its `heads.safetensors`.
        world: rank and world size.
        step: number of steps done.
        average: exported instead of the last weights, if given.
        check: called on rank 0 before each change; raises if another process may own the folder.
        expert: which of two transformers the student is.

    Returns:
        The export's folder.
    """
    folder = run_dir / EXPORT_FOLDER
    which: Which = "last" if average is None else "average"
    configs: Mapping[str, LoraConfig] = getattr(student.transformer, "peft_config", {})
    on_first_rank(world, check)
    with _student_weights(student, average, run_dir, world) as weights:
        settings = dict(student.transformer.config)
        adapter = configs.get(ADAPTER)
        name = type(student.transformer).__name__
        _write(
            weights,
            adapter,
            settings,
            name,
            folder,
            world,
            step=step,
            which=which,
            expert=expert,
            check=check,
        )
        heads = weights.read_all(HEADS, world)

        def save_heads() -> None:
            check()
            save_tensors(heads, run_dir / "heads.safetensors")

        if weights.names_under(HEADS):
            on_first_rank(world, save_heads)
    return folder


def export_checkpoint(
    run_dir: Path,
    step: int | Literal["best"] | None,
    out: Path | None,
    *,
    which: Which | None = None,
    form: LoraFormat = "diffusers",
) -> ExportSummary:
    """Export a checkpoint in a single process; same result as `export_weights` at that step.

    Args:
        run_dir: folder of the run, finished or not.
        step: step of a complete checkpoint; `best` takes the one that `train.keep_best` kept, None
            the newest.
        out: folder to write; None takes the run's export/ for the newest checkpoint, and
            export-STEP/ for a given step; -FORM is appended for other formats than diffusers.
        which: EMA or last weights; None takes the EMA if the run keeps one.
        form: key format of adapters.

    Raises:
        ValueError: there is no such run or complete checkpoint, the checkpoint is damaged or has no
            EMA, the format cannot hold the trained weights, or `out` exists and is not an export.
    """
    settings, transformer_name = _settings(run_dir)
    if step == "best":
        step = best_step(run_dir)
        if step is None:
            raise ValueError(
                f"{run_dir} has no best checkpoint: it needs train.keep_best, and a checkpoint "
                "whose losses or samples are done; name a step with --checkpoint"
            )
    checkpoint = _select_checkpoint(run_dir, step)
    out = out or run_dir / _folder_name(step, form)
    which = which or _usual(settings)
    lora = None
    if settings["train.method"] == "lora":
        lora = lora_config(LoraSettings(**_section(settings, "train.lora.")))
        check_format(form, dora=lora.use_dora)
    elif form != "diffusers":
        raise ValueError(
            f"{run_dir} trained the full transformer, but --format {form} is for LoRA adapters; "
            "leave out --format, since full transformers are exported only for diffusers"
        )
    with _checkpoint_weights(checkpoint, settings, which) as weights:
        transformer = _section(settings, "transformer.")
        _write(
            weights,
            lora,
            transformer,
            transformer_name,
            out,
            _SINGLE_PROCESS,
            step=checkpoint.step,
            which=which,
            expert=settings.get(EXPERT_SETTING),
            form=form,
        )
        exported = [
            name for name in weights.names_under(TRANSFORMER) if lora is None or ".lora_" in name
        ]
        parameters = sum(torch.Size(weights.shapes[name]).numel() for name in exported)
    return ExportSummary(
        folder=out,
        method="full" if lora is None else "lora",
        step=checkpoint.step,
        weights=which,
        form=form,
        transformer=transformer_name,
        expert=settings.get(EXPERT_SETTING),
        parameters=parameters,
    )


@contextmanager
def newest_weights(run_dir: Path) -> Iterator[tuple[Weights, int, Which]]:
    """Weights of a run's newest checkpoint: their EMA if the run keeps one; its step, and which.

    Raises:
        ValueError: there is no such run or complete checkpoint, or it is damaged.
    """
    settings, _ = _settings(run_dir)
    checkpoint, which = _select_checkpoint(run_dir, None), _usual(settings)
    with _checkpoint_weights(checkpoint, settings, which) as weights:
        yield weights, checkpoint.step, which


def _usual(settings: Mapping[str, Any]) -> Which:
    return "last" if settings.get("train.ema.decay") is None else "average"


def _write(
    weights: Weights,
    lora: LoraConfig | None,
    transformer: Mapping[str, Any],
    transformer_name: str,
    folder: Path,
    world: World,
    *,
    step: int,
    which: Which,
    expert: Expert | None,
    form: LoraFormat = "diffusers",
    check: Callable[[], None] = lambda: None,
) -> None:
    """Replace `folder` by an export of `weights`; it is either complete or absent."""
    partial = folder.with_name(f".{folder.name}.partial")

    def begin() -> None:
        check()
        if folder.exists() and not (folder / ABOUT).is_file():
            raise ValueError(f"{folder} exists and is not an export; name another folder")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "transformer" if lora is None else partial).mkdir(parents=True)

    def finish() -> None:
        files = {name: asdict(checksum_of(path)) for name, path in files_below(partial).items()}
        of_expert = {} if expert is None else {"expert": expert}
        record = {"step": step, "weights": which, **of_expert, "files": files}
        (partial / ABOUT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        sync_tree(partial)
        check()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    try:
        on_first_rank(world, begin)
        if lora is None:
            target = partial / "transformer"
            write_transformer(weights, transformer, transformer_name, target, world)
        else:
            write_lora(weights, lora, transformer_name, partial, world, form)
        on_first_rank(world, finish)
    except (OSError, SafetensorError) as error:
        if (why := write_error_reason(error, folder)) is None:
            raise
        raise OSError(f"the export {folder} could not be written: {why}") from error
    barrier(world)


@contextmanager
def _student_weights(
    student: Student, average: WeightAverage | None, run_dir: Path, world: World
) -> Iterator[Weights]:
    """Trained weights of a student in memory, or their EMA."""
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
        with gathered_parameters([parameter]):
            return parameter.detach().cpu().clone() if world.is_first else None

    weights = Weights(shapes=shapes, dtype=dtype, read=read)
    if average is None:
        yield weights
        return
    ema_folder = run_dir / ".average.partial"
    on_first_rank(world, lambda: _recreate(ema_folder))
    average.save(ema_folder)
    barrier(world)
    try:
        if world.is_first:
            with SavedAverage(ema_folder, world.size) as saved:
                yield _with_average(weights, saved)
        else:
            # Rank 0 reads the EMA from files; the other ranks only go through the same names.
            yield Weights(shapes=shapes, dtype=dtype, read=lambda name: None)
    finally:
        if world.is_first:
            shutil.rmtree(ema_folder, ignore_errors=True)


@contextmanager
def _checkpoint_weights(
    checkpoint: Checkpoint, settings: Mapping[str, Any], which: Which
) -> Iterator[Weights]:
    """Trained weights of a checkpoint, or their EMA."""
    bf16 = settings["train.deepspeed.precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    trained = CheckpointWeights(checkpoint, dtype, weights_needed=which == "last")
    weights = Weights(shapes=trained.shapes, dtype=dtype, read=trained.read)
    if which == "last":
        yield weights
        return
    with SavedAverage(checkpoint.folder, checkpoint.world_size) as saved:
        yield _with_average(weights, saved)


def _with_average(weights: Weights, saved: SavedAverage) -> Weights:
    """Replace the trained weights by their EMA; buffers, which have none, stay."""

    def read(name: str) -> Tensor | None:
        if name not in saved:
            return weights.read(name)
        shape = weights.shapes[name]
        return saved.read(name, 0, torch.Size(shape).numel()).view(shape).to(weights.dtype)

    return Weights(shapes=weights.shapes, dtype=weights.dtype, read=read)


def _settings(run_dir: Path) -> tuple[dict[str, Any], str]:
    """Settings of a run, and the class of its transformer."""
    file = run_dir / "run.json"
    if not file.is_file():
        raise ValueError(f"there is no run at {run_dir}; name the folder of one with --run")
    record = read_object(file, settings=dict)
    return record["settings"], str(record.get(TRANSFORMER_CLASS, "CogVideoXTransformer3DModel"))


def _folder_name(step: int | None, form: LoraFormat) -> str:
    name = EXPORT_FOLDER if step is None else f"{EXPORT_FOLDER}-{step}"
    # `sample` reads the run's export/, which must be in the diffusers format.
    return name if form == "diffusers" else f"{name}-{form}"


def _section(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}


def _select_checkpoint(run_dir: Path, step: int | None) -> Checkpoint:
    """Select the checkpoint of `step`, or the newest if None, and verify its files.

    Incomplete checkpoints are ignored. A damaged one is an error: an earlier step would not be what
    was requested.
    """
    complete = complete_checkpoints(checkpoints_of(run_dir))
    if not complete:
        raise ValueError(
            f"{run_dir} has no complete checkpoint; let the run reach one (train.checkpoint_every)"
        )
    steps = ", ".join(str(checkpoint.step) for checkpoint in complete)
    for checkpoint in complete:
        if step in (None, checkpoint.step):
            damage = find_damage(checkpoint, _SINGLE_PROCESS)
            if damage is None:
                return checkpoint
            raise ValueError(
                f"{checkpoint.folder} is damaged: {damage}; restore it from a copy, or name "
                f"another with --checkpoint; complete are those of {steps}"
            )
    raise ValueError(
        f"{run_dir} has no complete checkpoint of step {step}; complete are those of {steps}"
    )


def _recreate(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
