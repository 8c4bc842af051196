"""`export`: a checkpoint's weights for diffusers, ComfyUI, VideoX-Fun or musubi-tuner."""

import time
from pathlib import Path
from typing import Literal

from pipeline.console import CommandResult, format_time, json_values
from stages.progress import Progress

_LOADED_BY = {
    "diffusers": ("in diffusers", "pipe.load_lora_weights({folder!r}{second})"),
    "comfyui": ("in ComfyUI", "{folder}/comfyui_lora.safetensors with its own nodes"),
    "kohya": (
        "in VideoX-Fun or musubi-tuner",
        "{folder}/kohya_lora.safetensors as lora_path or network weights",
    ),
}
_FULL_LOADED_BY = ("in diffusers", "{name}.from_pretrained({folder!r}, subfolder='transformer')")


def run(
    progress: Progress,
    *,
    run_dir: Path,
    checkpoint: int | Literal["best"] | None = None,
    weights: Literal["average", "last"] | None = None,
    out: Path | None = None,
    form: Literal["diffusers", "comfyui", "kohya"] = "diffusers",
) -> CommandResult:
    """Export a complete checkpoint.

    Args:
        progress: Shows one task.
        run_dir: The run's folder.
        checkpoint: Step of the checkpoint, or the best one; None uses the latest one.
        weights: None uses the average if the run keeps one.
        out: Output folder; None writes a folder inside the run's.
        form: Key format of a LoRA.
    """
    from stages.train_student.checkpoints.export import export_checkpoint

    started = time.monotonic()
    with progress.task("export", 1, unit="checkpoint") as task:
        summary = export_checkpoint(run_dir, checkpoint, out, which=weights, form=form)
        task.advance()
    seconds = time.monotonic() - started
    program, call = _FULL_LOADED_BY if summary.method == "full" else _LOADED_BY[form]
    second = ", load_into_transformer_2=True" if summary.expert == "low-noise" else ""
    call = call.format(folder=str(summary.folder), name=summary.transformer, second=second)
    here = f"sam2vx-pipeline sample --run {summary.folder} --prompt …"
    kind = "LoRA" if summary.method == "lora" else "whole transformer"
    return CommandResult(
        title=f"exported {run_dir}",
        rows=[
            ("step", str(summary.step)),
            ("weights", "of the last step" if summary.weights == "last" else "averaged"),
            ("exported", f"{kind}, {summary.parameters:,} parameters"),
            *([] if summary.expert is None else [("transformer", summary.expert)]),
            (program, call),
            *([("in this project", here)] if form == "diffusers" else []),
            ("time", format_time(seconds)),
        ],
        data={
            "run": str(run_dir),
            **json_values(summary, export="folder", format="form"),
            "seconds": round(seconds, 3),
        },
        notes=[str(summary.folder)],
    )
