"""`probe`: which block's tokens agree with the teacher, before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cache_schema.shown_text import first_few
from pipeline.commands.assets import make_missing_assets
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import CommandResult
from pipeline.environment import provenance_of_run, world_size
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.probe_blocks.results import BlockLosses, ProbeResults


def run(config: RunConfig, progress: Progress, *, out: Path | None = None) -> CommandResult:
    """Probe the base model's blocks, or resume a stopped probe.

    Args:
        config: the whole configuration.
        out: folder of the results; None uses `probe` in `outputs`.

    Raises:
        ConfigError: a launcher started several processes.
    """
    from stages.probe_blocks.probe import probe_blocks
    from stages.probe_blocks.results import PICTURE_FILE

    if world_size() > 1:
        raise ConfigError("probe runs in one process; start it without torchrun or deepspeed")
    make_missing_assets(config, progress, reads=("base_model",))
    out = out or config.outputs / "probe"
    results = probe_blocks(
        config.probe,
        config.train,
        config.data,
        config.model,
        config.cache_root,
        out,
        provenance=provenance_of_run(),
        progress=progress,
    )
    picture = out / PICTURE_FILE
    uniform = results.uniform_loss
    rows = [
        ("clips", f"fitted on {results.fitted_on}, measured on {len(results.uniform)}"),
        ("uniform flow", f"loss {uniform.text}"),
        ("timesteps", ", ".join(map(str, results.timesteps))),
        *((f"block {block.block}", _describe(results, block)) for block in results.blocks),
    ]
    return CommandResult(
        title=f"probed blocks of {config.model.path}",
        rows=rows,
        data={"out": str(out), "picture": str(picture), **results.as_dict()},
        notes=[*_notes(results), str(picture)],
    )


def _describe(results: ProbeResults, block: BlockLosses) -> str:
    """Such as `agreement 0.410 [0.361, 0.449], loss 0.3215; at the timesteps 0.52 0.47 0.21`."""
    agreement = results.agreement(block)
    if agreement.missing:
        clips = f"{agreement.missing} of {len(results.uniform)} held-out clips"
        return f"none: the loss is NaN or infinite on {clips}"
    interval = "" if agreement.low is None else f" [{agreement.low:.3f}, {agreement.high:.3f}]"
    by_timestep = " ".join(
        f"{results.agreement(block, timestep).mean:.2f}" for timestep in results.timesteps
    )
    return (
        f"agreement {agreement.mean:.3f}{interval}, loss {results.loss(block):.4f}; "
        f"at the timesteps {by_timestep}"
    )


def _notes(results: ProbeResults) -> list[str]:
    notes = [f"left out: {key}: {why}" for key, why in sorted(results.excluded.items())]
    if results.best is None:
        return [*notes, "no block has a loss on every clip, so that none is the best"]
    best = f"block {results.best.block} agrees best"
    if results.uniform_loss.low is None:
        best += f", but there is no interval: {results.uniform_loss.note}"
    elif results.close_to_best:
        listed = first_few([str(block) for block in results.close_to_best], 8)
        best += f"; these clips cannot tell it from {listed}"
    notes += [
        f"{best}.",
        "Agreement is the part of a uniform flow's loss that a linear map of the block's tokens "
        "removes on held-out clips: 0 says nothing of the teacher, 1 is the teacher itself.",
        "A block that agrees already is the easiest to align, but also has the least left to "
        "learn. This does not show which block gains most: compare short runs of train.block. "
        "REPA, VideoREPA and a public re-implementation of the paper teach one at 0.3 to 0.6 of "
        "the depth.",
    ]
    return notes
