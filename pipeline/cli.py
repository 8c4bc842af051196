"""The command line `sam2vx-pipeline`: arguments in, a command carried out, an answer printed.

Commands and configuration are imported when a command runs, so that `--help` answers at once.
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
    carry_out,
    finish,
    load_settings,
    settings_of_run,
)
from pipeline.console import Answer, print_file, print_json, write_any_text
from pipeline.environment import take_place_from_slurm
from pipeline.inspect_cli import inspect

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
app.add_typer(config_app, name="config", help="Look at configurations.")
app.add_typer(cache_app, name="cache", help="Look after the stores: check, mend, thin out, move.")

LocalRank = Annotated[
    int | None,
    # deepspeed's launcher adds it, before or after the command; LOCAL_RANK says the same.
    typer.Option("--local_rank", "--local-rank", hidden=True, expose_value=False),
]


def main() -> None:
    """Run the command line; `pipeline.__main__` takes signals for it."""
    write_any_text()
    try:
        take_place_from_slurm()
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
    """Teach CogVideoX how structure moves, from SAM2's memory features.

    The road: extract-features makes a cache from a folder of clips, train teaches the model from
    the cache alone, sample draws a video with what was learnt. export turns any checkpoint into
    weights for diffusers. inspect looks into the cache, cache looks after it; demo walks the whole
    road on data and models that are made here.
    """


@app.command("extract-features")
def extract_features(
    overrides: Overrides = None,
    config: Config = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,KIND",
            help="Which stores to write: text, latents, teacher, gram_flow, masks; extract.kinds "
            "says the same.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Where the work runs: local or ray; extract.engine says the same."),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Also try again what earlier runs had to skip."),
    ] = False,
    refresh_changed: Annotated[
        bool,
        typer.Option(
            "--refresh-changed",
            help="Make clips again whose caption, video or prompt has changed since; the others "
            "are kept.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read the dataset's headers, compare all of its clips with the cache, and print "
            "what the run would need and skip; write nothing.",
        ),
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
    local_rank: LocalRank = None,
) -> None:
    """Stage one: teacher features, masks, latents and text states of every clip, into the cache.

    What is in the cache already is kept, and compared with the dataset: a part of it first, the
    rest when all shards are done. Run it again after an interruption, and it goes on; with clips
    added to the dataset, and it extracts those.
    """
    from pipeline.commands import estimate, extract

    chosen = [*(overrides or [])]
    chosen += [] if kinds is None else [f"extract.kinds=[{kinds}]"]
    chosen += [] if engine is None else [f"extract.engine={engine}"]
    settings = load_settings(config, chosen, traceback)
    run = estimate.run if dry_run else extract.run
    answer = carry_out(
        lambda p: run(settings, p, retry_failed=retry_failed, refresh_changed=refresh_changed),
        traceback,
        resumable=not dry_run,
    )
    finish(answer, as_json)


@app.command()
def train(
    overrides: Overrides = None,
    config: Config = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what the run would take of memory and time, and whether it fits; needs "
            "neither the cache nor weights.",
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --dry-run: for this GPU, such as h100 or a100-80gb; by default this "
            "machine's.",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: for so many of them; by default this machine's."),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
    local_rank: LocalRank = None,
) -> None:
    """Stage two: train the model from the cache; again in the same run_dir, go on where it stopped.

    With several GPUs: deepspeed --module pipeline train …, or torchrun --nproc-per-node 8
    -m pipeline train …
    """
    from pipeline.commands import train as command
    from pipeline.commands import train_estimate

    settings = load_settings(config, overrides, traceback, needed=("model.path",))
    if dry_run:
        answer = carry_out(lambda p: train_estimate.run(settings, p, gpu=gpu, gpus=gpus), traceback)
    elif gpu is not None or gpus is not None:
        raise typer.BadParameter(
            "--gpu and --gpus go with --dry-run; deepspeed or torchrun start a run on several"
        )
    else:
        answer = carry_out(lambda p: command.run(settings, p), traceback, resumable=True)
    finish(answer, as_json)


@app.command()
def export(
    run: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The training run's folder.")
    ],
    checkpoint: Annotated[
        int | None,
        typer.Option(
            metavar="STEP", help="Which complete checkpoint; by default the one of the most steps."
        ),
    ] = None,
    weights: Annotated[
        Literal["average", "last"] | None,
        typer.Option(help="By default the average, where the run keeps one."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="The folder to write; by default RUN/export, or RUN/export-STEP for a checkpoint "
            "that is named.",
        ),
    ] = None,
    form: Annotated[
        Literal["diffusers", "comfyui", "kohya"],
        typer.Option(
            "--format",
            help="Key form of adapters: diffusers (also for ComfyUI-CogVideoXWrapper and this "
            "program), comfyui (ComfyUI's own CogVideoX), or kohya (VideoX-Fun).",
        ),
    ] = "diffusers",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Write a checkpoint's weights as diffusers loads them: adapters, or a whole transformer.

    A finished run has its export already; this is for other steps, also of a run that goes on, and
    for other programs.
    """
    from pipeline.commands import export as command

    answer = carry_out(
        lambda p: command.run(
            p, run_dir=run, checkpoint=checkpoint, weights=weights, out=out, form=form
        ),
        traceback,
    )
    finish(answer, as_json)


@app.command()
def sample(
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What to draw; given several times, a video each. @prompts.txt stands for the "
            "lines of that file.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    config: Config = None,
    image: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="The first frame, for image-to-video models."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The .mp4 to write; by default a new name in outputs.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let --out replace a video that is there.")
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="The training run's folder, or one that export wrote; by default the run that "
            "finished last.",
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Draw from the base model, without a run.")
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Draw a video with the model that was trained.

    Without --config, the settings that the run of --run was trained with.
    """
    from pipeline.commands import sample as command

    config = config or settings_of_run(run)
    settings = load_settings(config, overrides, traceback, needed=("model.path",))
    answer = carry_out(
        lambda p: command.run(
            settings,
            p,
            prompts=prompt,
            image=image,
            out=out,
            overwrite=overwrite,
            run_dir=run,
            base_only=base,
        ),
        traceback,
    )
    finish(answer, as_json)


@app.command()
def report(
    overrides: Overrides = None,
    config: Config = None,
    run: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="The training run's folder; by default train.run_dir.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="The .html to write; by default report.html in the run."),
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Make one page of a training run: curves, sample videos, settings; it opens without network.

    A run that is still going on can be looked at, too.
    """
    from pipeline.commands import report as command

    settings = load_settings(config, overrides, traceback, needed=())
    answer = carry_out(lambda p: command.run(settings, p, run_dir=run, out=out), traceback)
    finish(answer, as_json)


app.command()(inspect)


@app.command()
def demo(
    overrides: Overrides = None,
    config: Config = "demo",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """The whole road on drawn figures and tiny models: extract, train, sample, inspect."""
    from pipeline.commands import demo as command

    settings = load_settings(config, overrides, traceback)
    answers: dict[str, Answer] = {}
    with failures.failures(traceback=traceback):
        for name, step in command.steps(settings):
            answers[name] = carry_out(step, traceback, resumable=True)
            if not as_json or answers[name].exit_code:
                finish(answers[name], as_json)
    finish(command.summary(answers), as_json)


@config_app.command("show")
def config_show(
    overrides: Overrides = None,
    config: Config = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Print the configuration with every default filled in, as YAML that can be edited and used."""
    from pipeline.config.text import commented_yaml

    settings = load_settings(config, overrides, traceback)
    if as_json:
        print_json(settings.model_dump(mode="json"))
    else:
        print_file(commented_yaml(settings))
