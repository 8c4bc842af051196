"""`train --dry-run`: what stage two would take, from configuration files and shapes alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pipeline.commands.assets import is_of_demo
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import Answer, in_bytes, in_flop, in_time
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.dry_run.train import SizedStores, TrainEstimate

_CHANNELS = {"memory_attention": 256, "memory_encoder": 64}
"""Of one direction's features, in every SAM2."""


def run(config: RunConfig, progress: Progress, *, gpu: str | None, gpus: int | None) -> Answer:
    """Estimate; needs neither the cache nor, of a hub id, weights, and writes nothing.

    Args:
        config: the whole configuration; the teacher's shape follows from its `extract`.
        progress: a note while shapes are gone through.
        gpu: short name of a GPU; None takes this machine's.
        gpus: how many; None takes as many processes as the launcher or the machine has.

    Raises:
        ConfigError: the demo's models are not made yet.
        ValueError: a setting does not fit, as the run would say; or no GPU has that name.
    """
    if is_of_demo(config, "cogvideox") and not config.model.is_local:
        raise ConfigError(
            f"there is no {config.model.path} yet: the demo's models are made by the first command "
            "that works with them, such as train without --dry-run"
        )
    from stages.cogvideox.official_models import facts_for_estimate
    from stages.cogvideox.weights import parts_are_here
    from stages.compute_cost.gpus import gpu_here, gpu_named
    from stages.dry_run.train import estimate
    from stages.train_student.parallel.deepspeed import check_engine_settings
    from stages.train_student.setup import check_block, weights_needed

    chosen = gpu_here() if gpu is None else gpu_named(gpu)
    number = _processes() if gpus is None else gpus
    facts, notes = facts_for_estimate(config.model)
    check_block(config.train, facts)
    parts_are_here(config.model, facts.folder, weights_needed(config.train))
    progress.log("going through a step on shapes alone")
    found = estimate(config.train, facts, _planned_stores(config), gpu=chosen, gpus=number)
    try:
        check_engine_settings(config.train)
    except ValueError as error:
        notes = (*notes, f"warning: on this machine the run would stop at once: {error}")
    answer = _answer(config, found)
    return replace(answer, notes=[*notes, *answer.notes])


def _processes() -> int:
    import torch

    launched = os.environ.get("WORLD_SIZE")
    return int(launched) if launched else max(torch.cuda.device_count(), 1)


def _planned_stores(config: RunConfig) -> list[SizedStores]:
    """What stage one would write with the same configuration; no store is looked at."""
    from stages.dry_run.train import SizedStores
    from stages.extract_features.teacher.stores import subject_settings
    from stages.train_student.config import KIND_OF_FORM
    from stages.train_student.objectives.needs import check_teacher, kinds_needed

    needed = kinds_needed(config.train)
    form = KIND_OF_FORM[config.train.teacher_form]
    extract = config.extract
    channels = _CHANNELS[extract.teacher.features]
    stores = []
    for size in config.data.sizes:
        planned: Mapping[Any, Any] = subject_settings(
            extract.teacher, size, {}, gram_flow=extract.gram_flow, channels=channels
        )
        teacher = planned[form] if form in needed else None
        check_teacher(config.train, teacher, f"the {form} store that extract asks for")
        stores.append(
            SizedStores(
                size=size,
                teacher=teacher,
                masks=planned["masks"] if "masks" in needed else None,
            )
        )
    return stores


def _answer(config: RunConfig, found: TrainEstimate) -> Answer:
    from stages.dry_run.train import ASSUMED_SHARE

    rows = [*_model_rows(config, found), *_memory_rows(found), *_work_rows(config, found)]
    notes = [
        "estimated: memory from shapes and from what DeepSpeed allocates, without samples and "
        "validation; time at an assumed "
        f"{ASSUMED_SHARE:.0%} of the GPU's peak rate, whatever the network between GPUs"
    ]
    return Answer(
        title=f"estimate of training with {config.name}",
        rows=rows,
        data=_data(config, found),
        notes=[*_verdict(found), *notes],
        exit_code=1 if found.fits is False else 0,
    )


def _model_rows(config: RunConfig, found: TrainEstimate) -> list[tuple[str, str]]:
    counts = found.counts
    parts = [
        f"{name} {_in_millions(count)}"
        for name, count in (("adapters", counts.adapters), ("heads", counts.heads))
        if count
    ]
    return [
        ("model", f"{config.model.path}, {_in_millions(counts.transformer)} parameters"),
        ("trained", ", ".join([_in_millions(counts.trained), *parts])),
    ]


def _memory_rows(found: TrainEstimate) -> list[tuple[str, str]]:
    memory = found.memory
    of = "" if found.gpu is None else f" of {in_bytes(found.gpu.memory_bytes)}, {found.gpu.name}"
    rows = [("memory of each GPU", in_bytes(memory.gpu_bytes) + of), *_parts(memory.gpu)]
    if memory.host:
        rows += [("host, each process", in_bytes(memory.host_bytes)), *_parts(memory.host)]
    if memory.disk:
        rows += [("disk, each process", in_bytes(memory.disk_bytes)), *_parts(memory.disk)]
    return rows


def _parts(parts: Mapping[str, int]) -> list[tuple[str, str]]:
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    return [(f"  {name}", in_bytes(size)) for name, size in largest_first]


def _work_rows(config: RunConfig, found: TrainEstimate) -> list[tuple[str, str]]:
    train = config.train
    per_clip = ", ".join(in_flop(cost.flops_per_clip) for cost in found.costs)
    rows = [
        (
            "step",
            f"{train.batch_size} clips = {train.batch_size // (found.gpus * found.passes)} x "
            f"{found.gpus} "
            f"{'GPU' if found.gpus == 1 else 'GPUs'} x {found.passes} passes",
        ),
        ("work", f"{in_flop(found.step_flops)} a step, {per_clip} a clip"),
    ]
    if found.seconds_per_step is not None:
        whole = found.seconds_per_step * train.steps
        rows.append(
            (
                "time",
                f"about {in_time(found.seconds_per_step)} a step, {in_time(whole)} for "
                f"{train.steps} steps",
            )
        )
    kept = train.checkpoints_kept * found.checkpoint_bytes
    rows.append(
        (
            "checkpoints",
            f"{in_bytes(found.checkpoint_bytes)} each, {in_bytes(kept)} for the "
            f"{train.checkpoints_kept} that stay",
        )
    )
    return rows


def _verdict(found: TrainEstimate) -> list[str]:
    if found.gpu is None:
        return ["this machine's GPU is not known; name one with --gpu to see whether it fits"]
    if found.fits:
        return []
    lack = (
        f"does not fit: {in_bytes(found.memory.gpu_bytes)} are needed on each GPU, and "
        f"{found.gpu.name} has {in_bytes(found.gpu.memory_bytes)}"
    )
    if found.remedy is None:
        return [f"{lack}; nothing that was tried would fit: take smaller clips or a larger GPU"]
    settings = " ".join(f"train.{name}={_told(v)}" for name, v in found.remedy.settings.items())
    where = "" if found.remedy.gpus == found.gpus else f"on {found.remedy.gpus} GPUs"
    what = " ".join(part for part in (settings, where) if part)
    return [f"{lack}; {what} would, with {in_bytes(found.remedy.memory.gpu_bytes)}"]


def _told(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _data(config: RunConfig, found: TrainEstimate) -> dict[str, Any]:
    remedy = found.remedy
    sizes: Sequence[Any] = config.data.sizes
    return {
        "model": config.model.path,
        "parameters": asdict(found.counts) | {"total": found.counts.total},
        "gpu": None if found.gpu is None else found.gpu.name,
        "gpus": found.gpus,
        "memory": {"gpu": dict(found.memory.gpu), "host": dict(found.memory.host)}
        | {"disk": dict(found.memory.disk)},
        "gpu_bytes": found.memory.gpu_bytes,
        "gpu_memory_bytes": None if found.gpu is None else found.gpu.memory_bytes,
        "host_bytes_per_process": found.memory.host_bytes,
        "fits": found.fits,
        "costs": [
            {"size": size.size_name} | asdict(cost)
            for size, cost in zip(sizes, found.costs, strict=True)
        ],
        "passes": found.passes,
        "step_flops": found.step_flops,
        "seconds_per_step": found.seconds_per_step,
        "seconds": None
        if found.seconds_per_step is None
        else found.seconds_per_step * config.train.steps,
        "checkpoint_bytes": found.checkpoint_bytes,
        "remedy": None
        if remedy is None
        else {
            "settings": dict(remedy.settings),
            "gpus": remedy.gpus,
            "gpu_bytes": remedy.memory.gpu_bytes,
        },
    }
