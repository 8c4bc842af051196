"""`sample`: videos from the base model and a run's weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache_schema.shown_text import first_few
from pipeline.commands.assets import make_missing_assets
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import CommandResult, format_time
from pipeline.environment import local_rank, provenance, rank, world_size
from pipeline.failures import TOO_MANY_SKIPPED
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.sample_videos.batch import Batch
    from stages.sample_videos.outputs import Output, VideoFormat
    from stages.sample_videos.requests import VideoRequest
    from stages.sample_videos.sample import VideoModel

_SUFFIXES: dict[str, VideoFormat] = {".mp4": "mp4", ".gif": "gif"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOptions:
    """What to sample and where to: the command's options that are not settings."""

    prompts: Sequence[str] = ()
    prompt_file: Path | None = None
    seeds: Sequence[int] = ()
    """Empty takes `sample.seed`."""
    num: int = 1
    """Videos per prompt, with consecutive seeds."""
    image: Path | None = None
    """First frame of prompts without their own; image-to-video models only."""
    run_dir: Path | None = None
    """The run, or the folder of both experts' runs; None uses the newest finished one of this base
    model beside `train.run_dir`."""
    base_only: bool = False
    compare: str | None = None
    """`base` or a run's folder, sampled from the same noise and shown beside."""
    out: Path | None = None
    """A folder, or the file of a single video; None makes a folder per model and settings in
    `outputs`."""
    form: VideoFormat | None = None
    """None takes the suffix of `out`, or mp4."""
    overwrite: bool = False
    """Replace videos of the same names that were made otherwise."""


def run(config: RunConfig, progress: Progress, options: SampleOptions) -> CommandResult:
    """Sample the videos that are not there yet; a JSON file beside each records how it was made.

    Everything is checked before any model is loaded: prompts, images, weights, and whether the
    files can be written. Under a launcher every process samples its share of the videos.

    Raises:
        ConfigError: Options that do not go together, or a name that is taken by another video.
        ValueError: Weights or images that are missing or do not fit.
    """
    from stages.sample_videos.batch import generate_batch, write_comparisons
    from stages.sample_videos.outputs import OtherVideoError
    from stages.sample_videos.sample import check_images, log_warnings, sampling_device

    _check_options(options)
    requests = _requests(config, options)
    make_missing_assets(config, progress, reads=("base_model",))
    device = sampling_device(config.sample, local_rank=local_rank())
    models = _models(config, options)
    log_warnings(models, progress)
    check_images(models[0], requests)
    about: dict[str, Any] = {"model": config.model.path, "made_with": provenance()}
    comparisons: list[Path] = []
    try:
        batches = [
            _open_batch(config, options, model, requests, alone=len(models) == 1)
            for model in models
        ]
        for batch in batches:
            generate_batch(batch, device=device, about=about, progress=progress)
        if len(batches) == 2:
            comparisons = write_comparisons(
                *batches, overwrite=options.overwrite, progress=progress
            )
    except OtherVideoError as error:
        raise ConfigError(f"{error}; give another --out, or --overwrite") from error
    return _result(config, batches, comparisons, num_requested=len(requests))


def _check_options(options: SampleOptions) -> None:
    from stages.clips.dataset.keys import has_video_suffix

    if options.base_only and options.run_dir is not None:
        raise ConfigError("--base uses the base model without a run; remove --run")
    if not options.prompts and options.prompt_file is None:
        raise ConfigError("name what to sample with --prompt TEXT or --prompt-file FILE")
    if options.compare is not None and options.form not in (None, "mp4"):
        raise ConfigError("--compare shows two videos in one mp4; remove --format")
    if options.out is not None and has_video_suffix(options.out.name):
        if options.out.suffix not in _SUFFIXES:
            raise ConfigError(f"--out ends in .mp4 or .gif, or is a folder, got {options.out}")
        if options.form not in (None, _SUFFIXES[options.out.suffix]):
            raise ConfigError(f"--out {options.out} and --format {options.form} differ; remove one")
        if options.compare is not None:
            raise ConfigError(
                f"--compare writes several videos; --out must be a folder, got {options.out}"
            )
    for text in options.prompts:
        file = text.removeprefix("@")
        if os.path.isfile(file):  # noqa: PTH113  Path.is_file raises on a long prompt
            raise ConfigError(
                f"--prompt {text} is a file; read its prompts with --prompt-file {file}"
            )


def _requests(config: RunConfig, options: SampleOptions) -> list[VideoRequest]:
    from stages.sample_videos.requests import PromptRow, make_requests, read_prompt_file

    rows = [PromptRow(prompt=text) for text in options.prompts]
    seeds = options.seeds or (config.sample.seed,)
    try:
        if options.prompt_file is not None:
            rows += read_prompt_file(options.prompt_file)
        return make_requests(rows, seeds=seeds, num=options.num, image=options.image)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _models(config: RunConfig, options: SampleOptions) -> list[VideoModel]:
    """The model to sample from, and the one to compare it with."""
    from stages.sample_videos.sample import BASE, open_video_model

    run_dirs = [options.run_dir]
    if options.run_dir is None and not options.base_only:
        run_dirs = [_newest_run(config)]
    if options.compare is not None:
        run_dirs.append(None if options.compare == BASE else Path(options.compare))
    models = [
        open_video_model(config.sample, config.model, config.data, run_dir=run_dir)
        for run_dir in run_dirs
    ]
    if len(models) == 2 and models[0].settings == models[1].settings:
        raise ConfigError(
            f"--compare {options.compare} has the weights that are compared; name another run"
        )
    if len(models) == 2 and models[0].name == models[1].name and options.out is not None:
        raise ConfigError(
            f"both models are named {models[0].name}, so that --out cannot hold a folder for each; "
            "remove --out"
        )
    return models


def _open_batch(
    config: RunConfig,
    options: SampleOptions,
    model: VideoModel,
    requests: Sequence[VideoRequest],
    *,
    alone: bool,
) -> Batch:
    """This process's share of a model's videos, and where they belong."""
    from stages.sample_videos.batch import default_folder, open_batch

    share = requests[rank() :: world_size()]
    out, overwrite = options.out, options.overwrite
    if out is not None and out.suffix in _SUFFIXES:
        if len(requests) > 1:
            raise ConfigError(
                f"--out {out} names one video, but there are {len(requests)}; name a folder"
            )
        form = _SUFFIXES[out.suffix]
        return open_batch(model, share, out.parent, stem=out.stem, form=form, overwrite=overwrite)
    if out is None:
        folder = default_folder(config.outputs, model)
    else:
        folder = out if alone else out / model.name
    return open_batch(model, share, folder, form=options.form or "mp4", overwrite=overwrite)


def _result(
    config: RunConfig, batches: Sequence[Batch], comparisons: Sequence[Path], *, num_requested: int
) -> CommandResult:
    first = batches[0]
    videos = [_data(batch, output) for batch in batches for output in batch.outputs]
    problems = {str(path): why for batch in batches for path, why in batch.problems.items()}
    shown = comparisons or [output.video for batch in batches for output in batch.outputs]
    return CommandResult(
        title=f"sampled with {config.name}",
        rows=[
            ("prompt", first_few(_distinct(one.request.prompt for one in first.outputs), 3)),
            ("seed", first_few(_distinct(str(one.request.seed) for one in first.outputs), 8)),
            *(("weights", str(batch.model.run_dir or "the base model's own")) for batch in batches),
            *_counts(batches, videos, num_requested),
            ("size", f"{first.model.size.size_name} at {first.model.fps:g} frames/s"),
            ("steps, guidance", f"{config.sample.steps}, {config.sample.guidance:g}"),
            ("time", format_time(sum(sum(batch.seconds.values()) for batch in batches))),
        ],
        data={
            "videos": videos,
            "comparisons": [str(path) for path in comparisons],
            "problems": problems,
        },
        notes=[*(f"{path}: {why}" for path, why in problems.items()), *_paths(shown)],
        exit_code=TOO_MANY_SKIPPED if problems else 0,
    )


def _counts(
    batches: Sequence[Batch], videos: Sequence[dict[str, Any]], num_requested: int
) -> list[tuple[str, str]]:
    total = f"{num_requested}{' per model' if len(batches) > 1 else ''}"
    if world_size() > 1:
        total += f", {len(batches[0].outputs)} of them by this process"
    kept = sum(video["state"] == "kept" for video in videos)
    return [("videos", total), *([("already there", f"{kept} of {len(videos)}")] if kept else [])]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


_MAX_PATHS = 8
"""Paths printed under the table."""


def _paths(paths: Sequence[Path]) -> list[str]:
    if len(paths) <= _MAX_PATHS:
        return [str(path) for path in paths]
    return _distinct(str(path.parent) for path in paths)


def _data(batch: Batch, output: Output) -> dict[str, Any]:
    state: Literal["made", "kept", "failed"] = "made"
    if output.video in batch.problems:
        state = "failed"
    elif output.video not in batch.seconds:
        state = "kept"
    return {
        "video": str(output.video),
        "prompt": output.request.prompt,
        "seed": output.request.seed,
        "image": None if output.request.image is None else str(output.request.image),
        "run": None if batch.model.run_dir is None else str(batch.model.run_dir),
        "weights": batch.model.weights,
        "state": state,
        "seconds": batch.seconds.get(output.video),
        "made_from": dict(output.made_from),
    }


def _newest_run(config: RunConfig) -> Path:
    from stages.sample_videos.runs import newest_finished_run

    runs = config.train.run_dir.parent
    newest = newest_finished_run(runs, config.model)
    if newest is None:
        raise ValueError(
            f"no finished run of {config.model.path} in {runs}; run sam2vx-pipeline train, name a "
            "run with --run, or use the base model alone with --base"
        )
    return newest
