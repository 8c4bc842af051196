"""Batches of videos: finding those that are there, generating the others, comparing two batches."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cache_schema import JSON
from cache_schema.shown_text import redacted
from stages.progress import Progress
from stages.sample_videos.outputs import (
    Output,
    VideoFormat,
    check_format,
    file_stem,
    settings_hash,
    unfinished,
)
from stages.sample_videos.requests import VideoRequest
from stages.sample_videos.sample import VideoModel, finite_frames, generate_videos
from stages.sample_videos.side_by_side import read_side_by_side


@dataclass(kw_only=True, slots=True)
class Batch:
    """Videos of one model."""

    model: VideoModel
    outputs: Sequence[Output]
    missing: Sequence[Output]
    """Those that were not there when the batch was opened."""
    seconds: dict[Path, float] = field(default_factory=dict)
    """Time of each video that was generated; the first one includes loading the models."""
    problems: dict[Path, str] = field(default_factory=dict)
    """Why a video was not written."""


def default_folder(parent: Path, model: VideoModel) -> Path:
    """A folder for the videos of one model and one set of settings."""
    return parent / f"{model.name}-{settings_hash(model.settings)}"


def open_batch(
    model: VideoModel,
    requests: Sequence[VideoRequest],
    folder: Path,
    *,
    stem: str | None = None,
    form: VideoFormat = "mp4",
    overwrite: bool = False,
) -> Batch:
    """Find out which videos are there, and check that the others can be written to the folder.

    Args:
        model: What generates them.
        requests: The videos.
        folder: Where they belong; created if missing.
        stem: File name without suffix of a single video; None makes names from prompt and seed.
        form: File format.
        overwrite: Replace files of the same names that were made otherwise.

    Raises:
        OtherVideoError: Such a file exists, and `overwrite` is false.
        ValueError: The format cannot show the frame rate.
        OSError: The folder cannot be written to.
    """
    check_format(form, model.fps)
    outputs = [
        Output(
            request=request,
            folder=folder,
            stem=stem or file_stem(request),
            form=form,
            made_from=model.made_from(request),
        )
        for request in requests
    ]
    missing = unfinished(outputs, overwrite=overwrite)
    if missing:
        _check_writable(folder)
    return Batch(model=model, outputs=outputs, missing=missing)


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def generate_batch(
    batch: Batch, *, device: torch.device, about: Mapping[str, JSON], progress: Progress
) -> None:
    """Generate and write the missing videos; one with NaN or infinite values is recorded as failed.

    Args:
        batch: The videos; its `seconds` and `problems` are filled in.
        device: Where the models run.
        about: Further members of each video's record.
        progress: Shows loading and denoising.

    Raises:
        ValueError: The only missing video is not finite, or weights do not fit.
    """
    if not batch.missing:
        return
    run = None if batch.model.run_dir is None else str(batch.model.run_dir)
    requests = [output.request for output in batch.missing]
    videos = generate_videos(batch.model, requests, device=device, progress=progress)
    started = time.monotonic()
    for output, video_THWC in zip(batch.missing, videos, strict=True):
        try:
            frames_THWC = finite_frames(video_THWC, batch.model.config)
        except ValueError as error:
            if len(batch.missing) == 1:
                raise
            batch.problems[output.video] = str(error)
            progress.log(f"{output.video}: {error}")
        else:
            seconds = round(time.monotonic() - started, 3)
            record = {**about, "run": run, "device": str(device), "seconds": seconds}
            output.write(frames_THWC, batch.model.fps, redacted(record))
            batch.seconds[output.video] = seconds
        started = time.monotonic()


def write_comparisons(
    left: Batch, right: Batch, *, overwrite: bool, progress: Progress
) -> list[Path]:
    """Write each pair of videos side by side, to `<left folder>-vs-<right folder>` beside them.

    Args:
        left: Videos of one model.
        right: Videos of another one, of the same requests in the same order.
        overwrite: Replace files of the same names that show other videos.
        progress: Shows a bar.

    Returns:
        The videos, also those that were there already; none where a side has a problem.

    Raises:
        OtherVideoError: A file exists that shows other videos, and `overwrite` is false.
    """
    names = (left.model.name, right.model.name)
    comparisons = []
    with progress.task("side by side", len(left.outputs), unit="videos") as task:
        for one, other in zip(left.outputs, right.outputs, strict=True):
            if one.video not in left.problems and other.video not in right.problems:
                output = Output(
                    request=one.request,
                    folder=one.folder.with_name(f"{one.folder.name}-vs-{other.folder.name}"),
                    stem=one.stem,
                    form="mp4",
                    made_from={"left": dict(one.made_from), "right": dict(other.made_from)},
                )
                if unfinished([output], overwrite=overwrite):
                    output.write(*read_side_by_side(one.video, other.video, names), {})
                comparisons.append(output.video)
            task.advance()
    return comparisons
