"""The command `sam2vx-pipeline probe`, which measures blocks before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import (
    Config,
    Json,
    Overrides,
    Traceback,
    load_settings,
    print_result,
    run_command,
)


def probe(
    overrides: Overrides = None,
    config: Config = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Output folder; default: probe in outputs."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the settings, print what would be read and computed, with memory and "
            "time, and stop before any weight is loaded.",
        ),
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Measure how well each block's tokens agree with the cached teacher, without training.

    A linear map per block is fitted on some clips of the cache and measured on others, at several
    timesteps. Writes heat_map.png, summary.json and scores.csv. Run it again to resume, or to add
    blocks.

    sam2vx-pipeline probe --config cogvideox-5b-lora probe.blocks=[5,15,25,35]
    """
    from pipeline.commands import probe as command
    from pipeline.commands import probe_estimate

    settings = load_settings(config, overrides, traceback, needed=("model.path",))
    if dry_run:
        result = run_command(lambda p: probe_estimate.run(settings, p), traceback)
    else:
        result = run_command(lambda p: command.run(settings, p, out=out), traceback, resumable=True)
    print_result(result, as_json)
