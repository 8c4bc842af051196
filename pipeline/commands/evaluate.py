"""`evaluate`: scores of generated videos, and the comparison of two sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.shown_text import first_few
from pipeline.commands.assets import make_missing_assets
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import CommandResult
from pipeline.environment import local_rank, provenance, provenance_of_run, world_size
from pipeline.failures import TOO_MANY_SKIPPED
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.evaluate.compare import Comparison
    from stages.evaluate.evaluate import Evaluation
    from stages.evaluate.reference import Reference
    from stages.evaluate.videos import Side
    from stages.sample_videos.batch import Batch
    from stages.sample_videos.requests import PromptRow, VideoRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What to score: the command's options that are no settings."""

    videos: Path | None = None
    """Folder of generated videos; None samples `run`."""
    run: str | None = None
    """`base`, or the folder of a training run or of an export."""
    against: str | None = None
    """A folder of videos of the same prompts and seeds; with `run` also `base` or a run."""
    prompt_file: Path | None = None
    """Prompts to sample; None takes the held-out clips of the run."""
    reference: Path | None = None
    """Real clips that the videos are measured against: a folder of videos, or a dataset."""
    num: int = 1
    """Videos per prompt, with consecutive seeds."""
    out: Path | None = None
    """Folder for the scores, the page, sampled videos and tracks; None makes one named after the
    videos or the run in `outputs`."""


def run(config: RunConfig, progress: Progress, options: EvaluateOptions) -> CommandResult:
    """Score the videos of a folder or of a run, and compare them with others.

    Raises:
        ConfigError: Options that do not go together, or a launcher started several processes.
        ValueError: A folder is missing or holds no videos, or weights do not fit.
    """
    from stages.evaluate.evaluate import compare_sides, score_side
    from stages.evaluate.output import write_evaluation
    from stages.evaluate.reference import track_reference

    if world_size() > 1:
        raise ConfigError("evaluate runs in one process; start it without torchrun or deepspeed")
    first = options.videos or Path(options.run or "")
    out = options.out or config.outputs / f"evaluation-{first.resolve().name}"
    reference = _reference(config, options)
    sides, failed = _sides(config, options, out, progress)
    if "structure" in config.evaluate.scores:
        make_missing_assets(config, progress, reads=("sam2",))
    tracked = None
    if reference is not None:
        tracked = track_reference(
            reference,
            config.extract,
            config.data,
            cache=out / "tracks" / f"reference-{reference.name}",
            temperature=config.train.lgf.temperature,
            provenance=provenance_of_run(),
            progress=progress,
        )
    scored = [
        score_side(
            side,
            config.evaluate,
            config.extract,
            config.data,
            cache=out / "tracks" / f"{role}-{side.folder.resolve().name}",
            temperature=config.train.lgf.temperature,
            provenance=provenance_of_run(),
            progress=progress,
            reference=tracked,
        )
        for role, side in zip(("videos", "against"), sides, strict=False)
    ]
    evaluation = compare_sides(scored, config.evaluate, tracked)
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
    return _result(config, evaluation, out, page, failed)


def _reference(config: RunConfig, options: EvaluateOptions) -> Reference | None:
    from stages.evaluate.reference import open_reference

    if options.reference is None:
        return None
    if "structure" not in config.evaluate.scores:
        raise ConfigError(
            "--reference measures structure, which evaluate.scores="
            f"[{','.join(config.evaluate.scores)}] leaves out; add it, or omit --reference"
        )
    given = {"the folder of videos itself": options.videos, "--against": options.against}
    for name, path in given.items():
        if path is not None and Path(path).resolve() == options.reference.resolve():
            raise ConfigError(f"--reference {options.reference} is {name}; name real clips")
    return open_reference(options.reference, config.data)


def _sides(
    config: RunConfig, options: EvaluateOptions, out: Path, progress: Progress
) -> tuple[list[Side], list[str]]:
    """The videos to score, sampled if they are to be; and what could not be sampled."""
    from stages.evaluate.videos import open_side
    from stages.sample_videos.sample import BASE

    if options.run is not None:
        return _sampled(config, options, out, progress)
    assert options.videos is not None
    sides = [open_side(options.videos.resolve().name, options.videos)]
    if options.against is not None:
        against = Path(options.against)
        if options.against == BASE and not against.is_dir():
            raise ConfigError("--against base needs --run; a folder of videos needs another one")
        if against.resolve() == options.videos.resolve():
            raise ConfigError(
                f"--against {against} is the folder of videos itself; name another one"
            )
        sides.append(_side_against(against, sides[0]))
    return sides, []


def _sampled(
    config: RunConfig, options: EvaluateOptions, out: Path, progress: Progress
) -> tuple[list[Side], list[str]]:
    """Sample the videos of the run, and of what it is compared with unless that is videos."""
    from stages.sample_videos.batch import default_folder, generate_batch, open_batch
    from stages.sample_videos.outputs import OtherVideoError
    from stages.sample_videos.runs import is_run
    from stages.sample_videos.sample import BASE, check_images, open_video_model, sampling_device

    make_missing_assets(config, progress, reads=("cogvideox",))
    device = sampling_device(config.sample, local_rank=local_rank())
    run_dirs = [None if options.run == BASE else Path(str(options.run))]
    against = None if options.against is None else Path(options.against)
    if options.against == BASE or (against is not None and is_run(against)):
        run_dirs.append(None if options.against == BASE else against)
        against = None
    models = [
        open_video_model(config.sample, config.model, config.data, run_dir=run_dir)
        for run_dir in run_dirs
    ]
    if len(models) == 2 and models[0].settings == models[1].settings:
        raise ConfigError(f"--against {options.against} has the weights that are evaluated")
    requests = _requests(config, options, run_dirs, out)
    check_images(models[0], requests)
    try:
        batches = [
            open_batch(model, requests, default_folder(out / "videos", model)) for model in models
        ]
    except OtherVideoError as error:
        raise ConfigError(f"{error}; remove it, or give another --out") from error
    about: dict[str, Any] = {"model": config.model.path, "made_with": provenance()}
    for batch in batches:
        generate_batch(batch, device=device, about=about, progress=progress)
    sides = [_side_of(batch) for batch in batches]
    if len({side.name for side in sides}) < len(sides):
        sides = [replace(side, name=side.folder.name) for side in sides]
    if against is not None:
        sides.append(_side_against(against, sides[0]))
    failed = [f"{path}: {why}" for batch in batches for path, why in batch.problems.items()]
    return sides, failed


def _side_against(folder: Path, first: Side) -> Side:
    """A folder of videos as the second side, of another name than the first one."""
    from stages.evaluate.videos import open_side

    name = folder.resolve().name
    return open_side(name if name != first.name else f"{name} (against)", folder)


def _side_of(batch: Batch) -> Side:
    """The videos of a batch; its folder may hold those of other prompts, too."""
    from stages.evaluate.videos import open_side

    folder = batch.outputs[0].folder
    side = open_side(batch.model.name, folder)
    mine = {output.video for output in batch.outputs}
    return replace(side, videos=tuple(video for video in side.videos if video.path in mine))


def _requests(
    config: RunConfig, options: EvaluateOptions, run_dirs: Sequence[Path | None], out: Path
) -> list[VideoRequest]:
    """The videos to sample: of a prompt file, or of the clips that the run holds out."""
    from stages.sample_videos.requests import make_requests, read_prompt_file

    try:
        if options.prompt_file is not None:
            rows = read_prompt_file(options.prompt_file)
        else:
            rows = _held_out_rows(config, run_dirs, out, options.num)
        return make_requests(rows, seeds=(config.sample.seed,), num=options.num, image=None)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _held_out_rows(
    config: RunConfig, run_dirs: Sequence[Path | None], out: Path, num: int
) -> list[PromptRow]:
    from cache_schema import StoreReader, find_store
    from stages.cogvideox.configs import resolve_base_model
    from stages.cogvideox.sampler import PIPELINES, pipeline_class
    from stages.evaluate.prompts import (
        held_out_prompts,
        with_seeds_of_their_own,
        write_first_frames,
    )
    from stages.train_student.run_folder import held_out_clips

    run_dir = next((one for one in run_dirs if one is not None), None)
    keys = () if run_dir is None else held_out_clips(run_dir)
    if not keys:
        raise ValueError(
            f"{run_dir or 'the base model'} holds no clips out of training "
            "(train.validation.clips), whose captions could be sampled; give --prompt-file FILE"
        )
    folder = config.train.folder_of("text")
    rows = held_out_prompts(keys, StoreReader(find_store(config.cache_root, "text", folder=folder)))
    if PIPELINES[pipeline_class(resolve_base_model(config.model, ()))]:
        images = write_first_frames(keys, config.data, out / "first-frames")
        rows = [replace(row, image=image) for row, image in zip(rows, images, strict=True)]
        return with_seeds_of_their_own(rows, config.sample.seed, num)
    return rows


def _result(
    config: RunConfig, evaluation: Evaluation, out: Path, page: Path, failed: Sequence[str]
) -> CommandResult:
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
    if evaluation.reference is not None:
        reference = evaluation.reference.reference
        rows.append((f"reference {reference.name}", f"{len(reference.captions)} clips"))
        for name, of_sides in evaluation.to_reference.items():
            rows += [
                (f"  {name} of {one.side.name}", distance.text)
                for one, distance in zip(evaluation.sides, of_sides, strict=True)
            ]
    notes = [
        f"{one.side.name} {key}: {why}"
        for one in evaluation.sides
        for key, why in sorted(one.problems.items())
    ]
    if evaluation.reference is not None:
        name = evaluation.reference.reference.name
        problems = sorted(evaluation.reference.problems.items())
        notes += [f"{name} {key}: {why}" for key, why in problems]
        notes += [
            f"{len(one.unmatched)} videos of {one.side.name} have no flow_divergence "
            f"({first_few([f'{key}: {why}' for key, why in sorted(one.unmatched.items())], 3)})"
            for one in evaluation.sides
            if one.unmatched
        ]
    if len(names) == 2:
        notes += _washed_out(evaluation)
    too_many = evaluation.skipped_share > config.evaluate.max_skipped
    if too_many:
        notes.append(
            f"{evaluation.skipped_share:.0%} of the videos lack scores or a partner, more than "
            f"evaluate.max_skipped={config.evaluate.max_skipped:g} allows"
        )
    data: dict[str, Any] = {
        "out": str(out),
        "page": str(page),
        "not_sampled": list(failed),
        **summary_of(evaluation),
    }
    return CommandResult(
        title=f"evaluated {' against '.join(names)}",
        rows=rows,
        data=data,
        notes=[*failed, *notes, str(page)],
        exit_code=TOO_MANY_SKIPPED if too_many or failed else 0,
    )


def _washed_out(evaluation: Evaluation) -> list[str]:
    """A note if the videos of the first side are washed out against those of the second."""
    from stages.video_scores.appearance import washed_out

    now, before = (
        {name: means[number].mean for name, means in evaluation.means.items()}
        for number in range(2)
    )
    names = [one.side.name for one in evaluation.sides]
    faded = washed_out(now, before)
    return [f"{names[0]} is washed out against {names[1]}: {', '.join(faded)}"] if faded else []


def _difference(found: Comparison) -> str:
    won = "" if found.win_rate is None else f"; better in {found.win_rate:.0%} of pairs"
    return f"{found.difference.text}{won}"
