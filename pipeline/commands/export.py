"""`export`: a checkpoint's weights as diffusers and others load them."""

import time
from pathlib import Path
from typing import Any, Literal

from pipeline.console import Answer, in_time
from stages.progress import Progress

_LOADED_BY = {
    "diffusers": ("in diffusers", "pipe.load_lora_weights({folder!r})"),
    "comfyui": ("in ComfyUI", "{folder}/comfyui_lora.safetensors with its own CogVideoX nodes"),
    "kohya": ("in VideoX-Fun", "{folder}/kohya_lora.safetensors as lora_path"),
}
_FULL_LOADED_BY = (
    "in diffusers",
    "CogVideoXTransformer3DModel.from_pretrained({folder!r}, subfolder='transformer')",
)


def run(
    progress: Progress,
    *,
    run_dir: Path,
    checkpoint: int | None = None,
    weights: Literal["average", "last"] | None = None,
    out: Path | None = None,
    form: Literal["diffusers", "comfyui", "kohya"] = "diffusers",
) -> Answer:
    """Export a complete checkpoint.

    Args:
        progress: Told when it begins and ends.
        run_dir: The run's folder.
        checkpoint: Its step; None takes the one of the most steps.
        weights: None takes the average where the run keeps one.
        out: The folder to write; None takes one within the run's.
        form: Key form of adapters.
    """
    from stages.train_student.checkpoints.export import export_checkpoint

    started = time.monotonic()
    with progress.task("export", 1, unit="checkpoint") as task:
        summary = export_checkpoint(run_dir, checkpoint, out, which=weights, form=form)
        task.advance()
    seconds = time.monotonic() - started
    loaded_by = _FULL_LOADED_BY if summary.method == "full" else _LOADED_BY[form]
    data: dict[str, Any] = {
        "export": str(summary.folder),
        "run": str(run_dir),
        "method": summary.method,
        "step": summary.step,
        "weights": summary.weights,
        "format": form,
        "parameters": summary.parameters,
        "seconds": round(seconds, 3),
    }
    here = f"sam2vx-pipeline sample --run {summary.folder} --prompt …"
    kind = "adapters" if summary.method == "lora" else "a whole transformer"
    return Answer(
        title=f"exported {run_dir}",
        rows=[
            ("step", str(summary.step)),
            ("weights", f"the {summary.weights} ones" if summary.weights == "last" else "averaged"),
            ("what", f"{kind}, {summary.parameters:,} numbers"),
            (loaded_by[0], loaded_by[1].format(folder=str(summary.folder))),
            *([("in this project", here)] if form == "diffusers" else []),
            ("time", in_time(seconds)),
        ],
        data=data,
        notes=[str(summary.folder)],
    )
