"""`evaluate`: scores of generated videos, and the comparison of two folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.assets import make_missing_assets
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import CommandResult
from pipeline.environment import provenance, provenance_of_run, world_size
from pipeline.failures import TOO_MANY_SKIPPED
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.evaluate.compare import Comparison
    from stages.evaluate.evaluate import Evaluation


def run(
    config: RunConfig,
    progress: Progress,
    *,
    videos: Path,
    against: Path | None = None,
    out: Path | None = None,
) -> CommandResult:
    """Score the videos of a folder, and compare them with those of another one.

    Args:
        config: The whole configuration.
        progress: Shows a bar for each step.
        videos: Folder of generated videos.
        against: Folder of other videos of the same prompts and seeds; None scores one folder.
        out: Folder for the scores, the page and the tracks; None makes one named after the folder
            of videos in `config.outputs`.

    Raises:
        ConfigError: Both folders are the same, or a launcher started several processes.
        ValueError: A folder is missing or holds no videos.
    """
    from stages.evaluate.evaluate import compare_sides, score_side
    from stages.evaluate.output import write_evaluation
    from stages.evaluate.videos import open_side

    if world_size() > 1:
        raise ConfigError("evaluate runs in one process; start it without torchrun or deepspeed")
    if against is not None and videos.resolve() == against.resolve():
        raise ConfigError(f"--against {against} is the folder of videos itself; name another one")
    out = out or config.outputs / f"evaluation-{videos.resolve().name}"
    sides = [open_side(videos.resolve().name, videos)]
    if against is not None:
        name = against.resolve().name
        sides.append(open_side(name if name != sides[0].name else f"{name} (against)", against))
    if "structure" in config.evaluate.scores:
        make_missing_assets(config, progress, reads=("sam2",))
    scored = [
        score_side(
            side,
            config.evaluate,
            config.extract,
            config.data,
            cache=out / "tracks" / role,
            temperature=config.train.lgf.temperature,
            provenance=provenance_of_run(),
            progress=progress,
        )
        for role, side in zip(("videos", "against"), sides, strict=False)
    ]
    evaluation = compare_sides(scored, config.evaluate)
    page = write_evaluation(
        evaluation,
        out,
        settings={
            "scores": list(config.evaluate.scores),
            "seed": config.evaluate.seed,
            "teacher": config.extract.teacher.model_dump(mode="json"),
            "gram_flow": config.extract.gram_flow.model_dump(mode="json"),
            "temperature": config.train.lgf.temperature,
            "clips": f"{config.data.num_frames}x{config.data.height}x{config.data.width}",
            "fps": config.data.fps,
        },
        made_with=provenance(),
    )
    return _result(config, evaluation, out, page)


def _result(config: RunConfig, evaluation: Evaluation, out: Path, page: Path) -> CommandResult:
    from stages.evaluate.output import summary_of

    names = [one.side.name for one in evaluation.sides]
    rows = [(one.side.name, f"{len(one.side.videos)} videos") for one in evaluation.sides]
    if len(names) == 2:
        rows.append(("pairs", f"{len(evaluation.pairs)}, {len(evaluation.unpaired)} without"))
    for score in evaluation.scores:
        means = " against ".join(mean.text for mean in evaluation.means[score.name])
        rows.append((f"{score.name} ({score.unit})", means))
        if found := evaluation.differences.get(score.name):
            rows.append(("  difference", _difference(found)))
    if evaluation.motion is not None:
        rows.append(("motion distance (MMD^2)", evaluation.motion.text))
    notes = [
        f"{one.side.name} {key}: {why}"
        for one in evaluation.sides
        for key, why in sorted(one.problems.items())
    ]
    too_many = evaluation.skipped_share > config.evaluate.max_skipped
    if too_many:
        notes.append(
            f"{evaluation.skipped_share:.0%} of the videos lack scores or a partner, more than "
            f"evaluate.max_skipped={config.evaluate.max_skipped:g} allows"
        )
    data: dict[str, Any] = {"out": str(out), "page": str(page), **summary_of(evaluation)}
    return CommandResult(
        title=f"evaluated {' against '.join(names)}",
        rows=rows,
        data=data,
        notes=[*notes, str(page)],
        exit_code=TOO_MANY_SKIPPED if too_many else 0,
    )


def _difference(found: Comparison) -> str:
    won = "" if found.win_rate is None else f"; better in {found.win_rate:.0%} of pairs"
    return f"{found.difference.text}{won}"
