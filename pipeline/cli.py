"""The command line `sam2vx-pipeline`.

Commands and configuration are imported when a command runs, so that `--help` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline import failures
from pipeline.cache_cli import cache_app
from pipeline.cli_options import (
    Config,
    Json,
    Overrides,
    Traceback,
    load_settings,
    print_result,
    run_command,
)
from pipeline.console import CommandResult, escape_unencodable_output, print_file, print_json
from pipeline.environment import set_rank_from_slurm
from pipeline.evaluate_cli import evaluate
from pipeline.explore_cli import explore
from pipeline.inspect_cli import inspect
from pipeline.preference_cli import preference_app
from pipeline.probe_cli import probe
from pipeline.sample_cli import sample

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 too many clips skipped, "
    "130 stopped with Ctrl-C or SIGTERM.",
)
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(config_app, name="config", help="Show configurations.")
app.add_typer(
    preference_app, name="preference", help="Let people compare videos blindly: make, read."
)
app.add_typer(cache_app, name="cache", help="Maintain stores: list, verify, repair, drop, copy, …")

LocalRank = Annotated[
    int | None,
    # Added by deepspeed's launcher before or after the command; LOCAL_RANK has the same value.
    typer.Option("--local_rank", "--local-rank", hidden=True, expose_value=False),
]


def main() -> None:
    """Run the command line. Signal handlers are installed by `pipeline.__main__`."""
    escape_unencodable_output()
    try:
        set_rank_from_slurm()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    app(prog_name="sam2vx-pipeline")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"sam2vx-pipeline {metadata.version('sam2videox')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            is_eager=True,
            expose_value=False,
            callback=_print_version,
        ),
    ] = False,
    local_rank: LocalRank = None,
) -> None:
    """Fine-tune CogVideoX or Wan on the structure of motion in SAM2's memory features.

    extract-features computes a cache from a folder of clips, train fine-tunes the model from the
    cache alone, sample generates videos with the result. probe measures, before training, which
    blocks agree with the teacher. export converts any checkpoint to weights for diffusers. inspect
    draws what the cache holds, explore shows it in a browser, cache maintains it; demo runs all
    steps on a generated dataset with tiny models.
    """


@app.command("extract-features")
def extract_features(
    overrides: Overrides = None,
    config: Config = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,KIND",
            help="Stores to write: text, latents, teacher, gram_flow, masks, visual. Sets "
            "extract.kinds.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Execution engine: local or ray. Sets extract.engine."),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Also retry clips that earlier runs skipped."),
    ] = False,
    refresh_changed: Annotated[
        bool,
        typer.Option(
            "--refresh-changed",
            help="Recompute clips whose caption, video or prompt has changed; keep the others.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read the headers of the videos, compare all clips with the cache, and print what "
            "the run would need and skip. Writes nothing.",
        ),
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
    local_rank: LocalRank = None,
) -> None:
    """Stage one: write teacher features, masks, latents and text embeddings to the cache.

    Clips that are in the cache are kept, and compared with the dataset: a part of them before the
    work, the rest when all shards are done. Run it again to resume after an interruption, or to
    process clips that were added to the dataset.
    """
    from pipeline.commands import estimate, extract

    chosen = [*(overrides or [])]
    chosen += [] if kinds is None else [f"extract.kinds=[{kinds}]"]
    chosen += [] if engine is None else [f"extract.engine={engine}"]
    settings = load_settings(config, chosen, traceback)
    run = estimate.run if dry_run else extract.run
    result = run_command(
        lambda p: run(settings, p, retry_failed=retry_failed, refresh_changed=refresh_changed),
        traceback,
        resumable=not dry_run,
    )
    print_result(result, as_json)


@app.command()
def train(
    overrides: Overrides = None,
    config: Config = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the memory and time the run would take, and whether it fits. Needs neither "
            "the cache nor weights.",
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --dry-run: estimate for this GPU, such as h100 or a100-80gb; default: this "
            "machine's.",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: number of GPUs; default: this machine's."),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
    local_rank: LocalRank = None,
) -> None:
    """Stage two: train the model from the cache; resumes if train.run_dir holds a stopped run.

    On several GPUs: deepspeed --module pipeline train …, or torchrun --nproc-per-node 8
    -m pipeline train …
    """
    from pipeline.commands import train as command
    from pipeline.commands import train_estimate

    settings = load_settings(config, overrides, traceback, needed=("model.path",))
    if dry_run:
        result = run_command(
            lambda p: train_estimate.run(settings, p, gpu=gpu, gpus=gpus), traceback
        )
    elif gpu is not None or gpus is not None:
        raise typer.BadParameter(
            "--gpu and --gpus need --dry-run; to train on several GPUs, use deepspeed or torchrun"
        )
    else:
        result = run_command(lambda p: command.run(settings, p), traceback, resumable=True)
    print_result(result, as_json)


@app.command()
def export(
    run: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The training run's folder.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="STEP|best",
            help="Step of a complete checkpoint, or best, the one that train.keep_best kept; "
            "default: the latest one.",
        ),
    ] = None,
    weights: Annotated[
        Literal["average", "last"] | None,
        typer.Option(help="The EMA or the last weights; default: the EMA if the run keeps one."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Output folder; default: RUN/export, or RUN/export-STEP with --checkpoint.",
        ),
    ] = None,
    form: Annotated[
        Literal["diffusers", "comfyui", "kohya"],
        typer.Option(
            "--format",
            help="LoRA key format: diffusers (also for ComfyUI-CogVideoXWrapper and this program), "
            "comfyui (ComfyUI's own nodes), or kohya (VideoX-Fun; musubi-tuner for Wan).",
        ),
    ] = "diffusers",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Export a checkpoint's weights for diffusers: a LoRA, or a whole transformer.

    A finished run already has its export; use this for other steps, for a run that is still
    training, and for other programs.
    """
    from pipeline.commands import export as command

    step = _step_of(checkpoint)
    result = run_command(
        lambda p: command.run(p, run_dir=run, checkpoint=step, weights=weights, out=out, form=form),
        traceback,
    )
    print_result(result, as_json)


def _step_of(checkpoint: str | None) -> int | Literal["best"] | None:
    if checkpoint is None:
        return None
    if checkpoint == "best":
        return "best"
    try:
        return int(checkpoint)
    except ValueError:
        raise typer.BadParameter(
            f"--checkpoint must be a step or best, got {checkpoint!r}"
        ) from None


@app.command()
def report(
    overrides: Overrides = None,
    config: Config = None,
    run: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="The training run's folder; default: train.run_dir.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="The .html to write; default: report.html in the run."),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Write a self-contained HTML page about a training run: curves, sample videos, settings.

    Also works while the run is training.
    """
    from pipeline.commands import report as command

    settings = load_settings(config, overrides, traceback, needed=())
    result = run_command(lambda p: command.run(settings, p, run_dir=run, out=out), traceback)
    print_result(result, as_json)


app.command()(probe)
app.command()(sample)
app.command()(evaluate)
app.command()(inspect)
app.command()(explore)


@app.command()
def demo(
    overrides: Overrides = None,
    config: Config = "demo",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Run all steps on a generated dataset with tiny models: extract, train, evaluate, inspect."""
    from pipeline.commands import demo as command

    settings = load_settings(config, overrides, traceback)
    results: dict[str, CommandResult] = {}
    with failures.exit_on_error(traceback=traceback):
        for name, step in command.steps(settings):
            results[name] = run_command(step, traceback, resumable=True)
            if not as_json or results[name].exit_code:
                print_result(results[name], as_json)
    print_result(command.summary(results), as_json)


@config_app.command("show")
def config_show(
    overrides: Overrides = None,
    config: Config = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Print the configuration with all defaults filled in, as YAML to edit and reuse."""
    from pipeline.config.text import commented_yaml

    settings = load_settings(config, overrides, traceback)
    if as_json:
        print_json(settings.model_dump(mode="json"))
    else:
        print_file(commented_yaml(settings))
