"""Memory and time of training steps under DeepSpeed, against the estimate of `train --dry-run`.

    python tests/benchmarks/train_memory.py --zero-stage 3 --offload optimizer --optimizer adamw8bit

A transformer with random weights and low-rank adapters makes steps of the run's own kind, with
Local Gram Flow from a cache, in an engine set up by the run's own code, on one process. What it
holds between steps, what the passes and the update add at most, and what libraries take are set
against the same parts of the estimate. On a CPU all of it is resident memory, which the estimate,
made for a GPU, does not describe.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from report import (
    finish,
    held_bytes,
    machine,
    median_and_spread,
    now,
    peak_bytes,
    reset_peak,
    table,
)
from step_overhead import (
    add_model_options,
    batches_of,
    facts_of,
    make_cache,
    make_transformer,
    settings,
    size_of,
)

from cache_schema import StoreSettings
from stages.dry_run.train import parameter_counts
from stages.dry_run.train_memory import MemoryEstimate, memory
from stages.students.cogvideox.configs import CogVideoXConfigs
from stages.train_student.config import TrainConfig
from stages.train_student.data.stores import Buckets, join_buckets
from stages.train_student.guards import update
from stages.train_student.model.student import Student
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import build_heads, build_objectives, kinds_needed
from stages.train_student.parallel.deepspeed import check_engine_settings, deepspeed_engine
from stages.train_student.parallel.process_group import process_group, world_from_environment
from stages.train_student.step import TrainingStep
from stages.train_student.step_costs import step_cost

OFFLOADED: Mapping[str, dict[str, str]] = {
    "none": {},
    "optimizer": {"offload_optimizer": "cpu"},
    "all": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
}
PARTS: Mapping[str, tuple[str, ...]] = {
    "held between steps": ("weights", "float32 weights", "moments", "average"),
    "added by the passes": (
        "gradients",
        "activations",
        "batch",
        "communication",
        "gathered weights",
    ),
    "added by the update": ("gradients", "update"),
    "lost to fragmentation": ("fragmentation, assumed",),
    "libraries": ("libraries, assumed",),
}
"""What is measured, and the parts of the estimate that describe it."""


def train_config(options: argparse.Namespace) -> TrainConfig:
    """Training as the preset has it, in the engine that was asked for."""
    base = settings(options, ("lgf",)).model_dump()
    on_gpu = options.device.startswith("cuda")
    engine = {"zero_stage": options.zero_stage, "precision": "bf16" if on_gpu else "fp32"}
    return TrainConfig.model_validate(
        base
        | {
            "deepspeed": engine | OFFLOADED[options.offload],
            "optimizer": base["optimizer"] | {"name": options.optimizer},
        }
    )


def make_steps(
    config: TrainConfig, configs: CogVideoXConfigs, options: argparse.Namespace, folder: Path
) -> tuple[dict[str, int], list[float], list[float]]:
    """Bytes by part of `PARTS`; seconds and losses of every step but the first."""
    world = world_from_environment()
    device = world.device
    found: dict[str, int] = dict.fromkeys(PARTS, 0)
    seconds, losses = [], []
    stores, teacher = open_cache(config, options, folder)
    with process_group(world):
        transformer = make_transformer(configs, options)
        heads = build_heads(config, configs, teacher).to(transformer.dtype)
        student = Student(transformer, heads, config.block).to(device)
        training_step = TrainingStep(
            configs,
            build_objectives(config),
            layout=TeacherLayout.of(teacher),
            device=device,
            dtype=transformer.dtype,
        )
        with deepspeed_engine(student, config, world) as engine:
            batches = batches_of(stores, configs, device)
            for number in range(options.repeats + 1):
                if number == 1 and device.type == "cuda":
                    torch.cuda.empty_cache()  # what building the model left
                held, started = held_bytes(device), now(device)
                reset_peak(device)
                loss = training_step(engine, next(batches).to(device), number).total
                engine.backward(loss)
                passes = peak_bytes(device)
                reset_peak(device)
                if update(engine) is None:
                    raise SystemExit(f"the gradient of step {number} is NaN or infinite")
                if number:
                    seconds.append(now(device) - started)
                    losses.append(float(loss.detach()))
                    step = (held, passes - held, peak_bytes(device) - held, *overhead(device))
                    found = {
                        name: max(most, one)
                        for (name, most), one in zip(found.items(), step, strict=True)
                    }
    return found, seconds, losses


def open_cache(
    config: TrainConfig, options: argparse.Namespace, folder: Path
) -> tuple[Buckets, StoreSettings]:
    """The stores, and the settings of the teacher's."""
    stores = join_buckets(folder, (size_of(options),), {}, kinds=kinds_needed(config))
    reader = stores.stores[0].teacher
    assert reader is not None
    return stores, reader.settings


def overhead(device: torch.device) -> tuple[int, int]:
    """Bytes that the allocator took and nothing used at the peak, and those of libraries."""
    if device.type != "cuda":
        return 0, 0
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    most = torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return most, total - free - reserved


def estimate(
    config: TrainConfig, configs: CogVideoXConfigs, options: argparse.Namespace, folder: Path
) -> MemoryEstimate:
    """What the dry run says of the same settings."""
    _, teacher = open_cache(config, options, folder)
    cost = step_cost(config, configs, size_of(options), teacher=teacher)
    return memory(
        config,
        parameter_counts(config, configs, teacher),
        processes=1,
        activation_bytes=cost.activation_bytes,
        batch_bytes=cost.batch_bytes,
    )


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--form", choices=["features", "gram_flow"], default="features")
    parser.add_argument("--zero-stage", type=int, choices=range(1, 4), default=2)
    parser.add_argument("--offload", choices=OFFLOADED, default="none")
    parser.add_argument("--optimizer", choices=["adamw", "adamw8bit"], default="adamw")
    options = parser.parse_args()
    if torch.device(options.device).type != world_from_environment().device.type:
        parser.error("an engine runs on the GPU if there is one, whatever --device says")
    config, configs = train_config(options), facts_of(options)
    check_engine_settings(config)
    with tempfile.TemporaryDirectory() as name:
        make_cache(Path(name), configs, options)
        estimated = estimate(config, configs, options, Path(name)).gpu
        measured, seconds, losses = make_steps(config, configs, options, Path(name))
    said = {part: sum(estimated.get(name, 0) for name in names) for part, names in PARTS.items()}
    rows = [[part, *(f"{of[part] / 2**20:.0f}" for of in (measured, said))] for part in PARTS]
    most = measured["held between steps"] + max(
        measured["added by the passes"], measured["added by the update"]
    )
    whole = most + measured["lost to fragmentation"] + measured["libraries"]
    rows.append(["everything", f"{whole / 2**20:.0f}", f"{sum(estimated.values()) / 2**20:.0f}"])
    middle, spread = median_and_spread(seconds)
    finish(
        "train_memory",
        table(["part", "measured, MiB", "dry run, MiB"], rows)
        + f"\n\n{middle:.2f} seconds a step ({spread[0]:.2f} to {spread[1]:.2f}).",
        {
            "ratio": round(whole / sum(estimated.values()), 3),
            "target": 1.0,
            "seconds_per_step": round(middle, 3),
            "spread": [round(value, 3) for value in spread],
            "losses": losses,
            "peak_mib": whole >> 20,
            "measured_mib": {part: size >> 20 for part, size in measured.items()},
            "estimated_mib": {part: size >> 20 for part, size in said.items()},
            "estimated_parts_mib": {part: size >> 20 for part, size in estimated.items()},
            "machine": machine(torch.device(options.device)),
            "settings": {
                name: str(value)
                for name, value in vars(options).items()
                if name not in ("write", "device")
            },
        },
        options.write,
    )


if __name__ == "__main__":
    main()
