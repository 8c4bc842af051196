"""`train`: stage two."""

from dataclasses import asdict
from typing import Any

from pipeline.commands.assets import make_missing_assets
from pipeline.config import RunConfig
from pipeline.console import Answer, in_bytes, in_time
from pipeline.provenance import provenance_of_run
from stages.progress import Progress


def run(config: RunConfig, progress: Progress) -> Answer:
    """Train, or go on with a run that was stopped."""
    from stages.train_student.train import train_student

    make_missing_assets(config, progress)
    summary = train_student(
        config.train,
        config.data,
        config.model,
        config.cache_root,
        resolved_config=config.model_dump(mode="json"),
        provenance=provenance_of_run(),
        progress=progress,
    )
    data: dict[str, Any] = {
        "run_dir": str(summary.run_dir),
        "steps_done": summary.steps_done,
        "resumed_from": summary.resumed_from,
        "already_finished": summary.already_finished,
        "clips": summary.clips,
        "left_out": summary.left_out,
        "left_out_by_name": summary.left_out_by_name,
        "first": asdict(summary.first),
        "last": asdict(summary.last),
        "seconds_per_step": summary.seconds_per_step,
        "peak_memory_bytes": summary.peak_memory_bytes,
        "export": str(summary.export),
    }
    rows = [
        ("run", str(summary.run_dir)),
        ("steps", _steps(data)),
        ("clips", f"{summary.clips}{_left_out(summary.left_out, summary.left_out_by_name)}"),
    ]
    for name in ("loss", "diffusion", "auxiliary"):
        first, last = data["first"][name], data["last"][name]
        if first is not None:
            rows.append((name, f"{first:.4f} at step {data['first']['step']}, {last:.4f} now"))
    if summary.seconds_per_step is not None:
        rows.append(("time", f"{in_time(summary.seconds_per_step)} a step"))
    rows.append(("peak memory", in_bytes(summary.peak_memory_bytes)))
    rows.append(("weights", str(summary.export)))
    return Answer(title=f"trained with {config.name}", rows=rows, data=data)


def _steps(data: dict[str, Any]) -> str:
    if data["already_finished"]:
        return f"{data['steps_done']}, finished before"
    resumed = data["resumed_from"]
    return f"{data['steps_done']}" + (f", resumed after {resumed}" if resumed else "")


def _left_out(left_out: dict[str, int], by_name: int) -> str:
    listed = [f"{count} of {kind}" for kind, count in left_out.items() if count]
    lacking = f"; not in every store: {', '.join(listed)}" if listed else ""
    return lacking + (f"; {by_name} left out by train.leave_out" if by_name else "")
