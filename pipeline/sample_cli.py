"""The command `sam2vx-pipeline sample`, which generates videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli_options import (
    Config,
    Json,
    Overrides,
    Traceback,
    config_file_of_run,
    load_settings,
    print_result,
    run_command,
)

_SETTINGS = "Settings, each the same as its key in the configuration"


def sample(
    overrides: Overrides = None,
    config: Config = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text prompt; repeat it for several videos.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Prompts: a .txt with one per line, or a .csv or .jsonl with prompt and, "
            "optionally, image and seed.",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Seed of the noise; repeat it for several videos per prompt. A seed in the prompt "
            "file comes first.",
            show_default=False,
        ),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Videos per prompt, with consecutive seeds.")] = 1,
    image: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="The first frame, for image-to-video models. An image in the prompt file comes "
            "first.",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="The folder of a training run or of an export, or one that holds those of both "
            "transformers of Wan 2.2; default: the newest finished run.",
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Use the base model alone, without a run's weights.")
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="base|RUN",
            help="Also sample the base model, or another run, from the same noise, and write both "
            "side by side.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder, or the .mp4 or .gif of a single video; default: a folder per model and "
            "settings in outputs."
        ),
    ] = None,
    form: Annotated[
        Literal["mp4", "gif", "frames"] | None,
        typer.Option("--format", help="mp4 (the default), gif, or frames: a folder of PNG images."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace videos of the same names that were made otherwise."
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(help="sample.steps: denoising steps.", rich_help_panel=_SETTINGS),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="sample.guidance: guidance scale.", rich_help_panel=_SETTINGS),
    ] = None,
    dynamic_cfg: Annotated[
        bool,
        typer.Option(
            "--dynamic-cfg",
            help="sample.dynamic_cfg: vary the guidance over the steps.",
            rich_help_panel=_SETTINGS,
        ),
    ] = False,
    scheduler: Annotated[
        Literal["model", "ddim", "dpm"] | None,
        typer.Option(help="sample.scheduler: the sampler.", rich_help_panel=_SETTINGS),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="sample.num_frames: length, 8N+1.", rich_help_panel=_SETTINGS),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="FxHxW",
            help="Frames, height and width in one, such as 49x480x720; or HxW.",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="sample.fps: frames per second of the file.", rich_help_panel=_SETTINGS),
    ] = None,
    lora_scale: Annotated[
        float | None,
        typer.Option(
            help="sample.lora_scale: strength of the run's adapters.", rich_help_panel=_SETTINGS
        ),
    ] = None,
    offload: Annotated[
        Literal["none", "model", "sequential"] | None,
        typer.Option(
            help="sample.offload: keep models on the CPU until they run.", rich_help_panel=_SETTINGS
        ),
    ] = None,
    tile: Annotated[
        bool,
        typer.Option("--tile", help="sample.tiling: decode in tiles.", rich_help_panel=_SETTINGS),
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Generate videos with the trained model; what is there already is kept.

    Videos are named {prompt}-{seed}.mp4, as VBench expects, with a JSON file beside each. Without
    --config, the settings of the run named by --run apply. Under torchrun, the processes share the
    videos.

    sam2vx-pipeline sample --prompt-file prompts.txt --num 5 --run runs/lgf --compare base

    torchrun --nproc-per-node 8 -m -- pipeline sample --prompt-file prompts.txt --run runs/lgf
    """
    from pipeline.commands import sample as command

    chosen = {
        "steps": steps,
        "guidance": guidance,
        "dynamic_cfg": dynamic_cfg or None,
        "scheduler": scheduler,
        "num_frames": frames,
        "fps": fps,
        "lora_scale": lora_scale,
        "offload": offload,
        "tiling": tile or None,
        **_parts_of_size(size, frames),
    }
    settings = load_settings(
        config or config_file_of_run(run),
        [
            *(overrides or []),
            *(f"sample.{name}={value}" for name, value in chosen.items() if value is not None),
        ],
        traceback,
        needed=("model.path",),
    )
    options = command.SampleOptions(
        prompts=prompt or (),
        prompt_file=prompt_file,
        seeds=seed or (),
        num=num,
        image=image,
        run_dir=run,
        base_only=base,
        compare=compare,
        out=out,
        form=form,
        overwrite=overwrite,
    )
    result = run_command(lambda p: command.run(settings, p, options), traceback, resumable=True)
    print_result(result, as_json)


def _parts_of_size(size: str | None, frames: int | None) -> dict[str, str]:
    """The settings that --size stands for, as text; their values are checked with the others."""
    if size is None:
        return {}
    names = ("num_frames", "height", "width")
    numbers = size.lower().split("x")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(f"--size is FxHxW, such as 49x480x720, or HxW, got {size}")
    if len(numbers) == 3 and frames is not None:
        raise typer.BadParameter(f"--size {size} names the frames already; remove --frames")
    return dict(zip(names[-len(numbers) :], numbers, strict=True))
