"""The videos that `evaluate` scores: of folders, or sampled by `--run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.assets import make_missing_assets
from pipeline.config.load import ConfigError, RunConfig
from pipeline.environment import local_rank, provenance
from stages.progress import Progress

if TYPE_CHECKING:
    from pipeline.commands.evaluate import EvaluateOptions
    from stages.evaluate.reference import Reference
    from stages.evaluate.videos import Side
    from stages.sample_videos.batch import Batch
    from stages.sample_videos.requests import PromptRow, VideoRequest


def open_sides(options: EvaluateOptions) -> list[Side]:
    """The folders of videos to score.

    Raises:
        ConfigError: Both are one folder, or `against` names no folder.
        ValueError: A folder is missing or holds no videos.
    """
    from stages.evaluate.videos import open_side
    from stages.sample_videos.sample import BASE

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
    return sides


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledSides:
    """Sampled videos."""

    sides: list[Side]
    problems: list[str]
    """Videos that could not be sampled, and why."""
    reference: Reference | None
    """The held-out clips, if the videos were sampled from their first frames."""


def sample_sides(
    config: RunConfig, options: EvaluateOptions, out: Path, progress: Progress
) -> SampledSides:
    """Sample the videos of the run, and of what it is compared with unless that is videos.

    Raises:
        ConfigError: Options that do not go together, or other videos have the names of these.
        ValueError: Weights do not fit, or a folder holds no videos.
    """
    from stages.sample_videos.batch import default_folder, generate_batch, open_batch
    from stages.sample_videos.outputs import OtherVideoError
    from stages.sample_videos.runs import is_run
    from stages.sample_videos.sample import (
        BASE,
        check_images,
        log_warnings,
        open_video_model,
        sampling_device,
    )

    make_missing_assets(config, progress, reads=("base_model",))
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
    log_warnings(models, progress)
    requests, reference = _requests(config, options, run_dirs, out)
    check_images(models[0], requests)
    try:
        batches = [
            open_batch(model, requests, default_folder(out / "videos", model)) for model in models
        ]
    except OtherVideoError as error:
        raise ConfigError(f"{error}; remove it, or give another --out") from error
    _place_masks(batches)
    about: dict[str, Any] = {"model": config.model.path, "made_with": provenance()}
    for batch in batches:
        generate_batch(batch, device=device, about=about, progress=progress)
    sides = [_side_of(batch) for batch in batches]
    if len({side.name for side in sides}) < len(sides):
        sides = [replace(side, name=side.folder.name) for side in sides]
    if against is not None:
        sides.append(_side_against(against, sides[0]))
    problems = [f"{path}: {why}" for batch in batches for path, why in batch.problems.items()]
    return SampledSides(sides=sides, problems=problems, reference=reference)


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


def _place_masks(batches: Sequence[Batch]) -> None:
    """Put the masks of first frames beside the videos, whose subjects are tracked from them."""
    from stages.evaluate.first_frame_masks import place_masks

    try:
        for batch in batches:
            for output in batch.outputs:
                if output.request.image is not None:
                    place_masks(output.request.image, output.video, batch.model.size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _requests(
    config: RunConfig, options: EvaluateOptions, run_dirs: Sequence[Path | None], out: Path
) -> tuple[list[VideoRequest], Reference | None]:
    """The videos to sample, of a prompt file or of the clips that the run holds out; and these
    clips, if they are sampled from their first frames and tracked."""
    from stages.evaluate.reference import held_out_reference
    from stages.sample_videos.requests import make_requests, read_prompt_file

    reference = None
    try:
        if options.prompt_file is not None:
            rows = read_prompt_file(options.prompt_file)
        else:
            of_clips = _held_out_rows(config, run_dirs, out, options.num)
            rows = list(of_clips.values())
            has_frames = any(row.image is not None for row in rows)
            if options.reference is None and has_frames and "structure" in config.evaluate.scores:
                reference = held_out_reference(of_clips, config.data, num=options.num)
        requests = make_requests(rows, seeds=(config.sample.seed,), num=options.num, image=None)
        return requests, reference
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _held_out_rows(
    config: RunConfig, run_dirs: Sequence[Path | None], out: Path, num: int
) -> dict[str, PromptRow]:
    """The prompts of the held-out clips, by key."""
    from cache_schema import StoreNotFound, StoreReader, find_store
    from stages.evaluate.prompts import (
        held_out_prompts,
        with_seeds_of_their_own,
        write_first_frames,
    )
    from stages.sample_videos.runs import runs_in
    from stages.students.hub import resolve_base_model
    from stages.students.sampler import takes_image
    from stages.train_student.run_folder import held_out_clips, store_of

    run_dir = next((one for one in run_dirs if one is not None), None)
    keys: tuple[str, ...] = ()
    if run_dir is not None:
        run_dir, *others = runs_in(run_dir)
        # Of two experts, the clips that neither was trained on.
        of_others = [set(held_out_clips(other)) for other in others]
        keys = tuple(
            key for key in held_out_clips(run_dir) if all(key in held for held in of_others)
        )
    if not keys:
        raise ValueError(
            f"{run_dir or 'the base model'} holds no clips out of training "
            "(train.validation.clips), whose captions could be sampled; give --prompt-file FILE"
        )
    folder = config.train.folder_of("text")
    try:
        text = find_store(config.cache_root, "text", folder=folder)
    except StoreNotFound:
        # A cache may hold several students' text; captions are those of the run's own.
        if folder is not None or run_dir is None or store_of(run_dir, "text") is None:
            raise
        text = find_store(config.cache_root, "text", folder=store_of(run_dir, "text"))
    rows = held_out_prompts(keys, StoreReader(text))
    if takes_image(resolve_base_model(config.model, ())):
        images = write_first_frames(keys, config.data, out / "first-frames")
        rows = [replace(row, image=image) for row, image in zip(rows, images, strict=True)]
        rows = with_seeds_of_their_own(rows, config.sample.seed, num)
    return dict(zip(keys, rows, strict=True))
