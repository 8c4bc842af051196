"""`export`: a checkpoint's weights as diffusers loads them."""

import time
from pathlib import Path
from typing import Any, Literal

from pipeline.console import Answer, in_time
from stages.progress import Progress

_LOADED_WITH = {
    "lora": "pipe.load_lora_weights({!r})",
    "full": "CogVideoXTransformer3DModel.from_pretrained({!r}, subfolder='transformer')",
}


def run(
    progress: Progress,
    *,
    run_dir: Path,
    checkpoint: int | None = None,
    weights: Literal["average", "last"] | None = None,
    out: Path | None = None,
) -> Answer:
    """Export a complete checkpoint.

    Args:
        progress: Told when it begins and ends.
        run_dir: The run's folder.
        checkpoint: Its step; None takes the one of the most steps.
        weights: None takes the average where the run keeps one.
        out: The folder to write; None takes one within the run's.
    """
    from stages.train_student.export import export_checkpoint

    started = time.monotonic()
    with progress.task("export", 1, unit="checkpoint") as task:
        summary = export_checkpoint(run_dir, checkpoint, out, which=weights)
        task.advance()
    seconds = time.monotonic() - started
    loaded_with = _LOADED_WITH[summary.method].format(str(summary.folder))
    data: dict[str, Any] = {
        "export": str(summary.folder),
        "run": str(run_dir),
        "method": summary.method,
        "step": summary.step,
        "weights": summary.weights,
        "parameters": summary.parameters,
        "seconds": round(seconds, 3),
    }
    kind = "adapters" if summary.method == "lora" else "a whole transformer"
    return Answer(
        title=f"exported {run_dir}",
        rows=[
            ("step", str(summary.step)),
            ("weights", f"the {summary.weights} ones" if summary.weights == "last" else "averaged"),
            ("what", f"{kind}, {summary.parameters:,} numbers"),
            ("in diffusers", loaded_with),
            ("in this project", f"sam2vx-pipeline sample --run {summary.folder} --prompt …"),
            ("time", in_time(seconds)),
        ],
        data=data,
        notes=[str(summary.folder)],
    )
