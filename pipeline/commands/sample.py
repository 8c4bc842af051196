"""`sample`: videos from the base model and a run's weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.atomic_io import add_path_to_errors
from cache_schema.shown_text import redacted
from pipeline.commands.assets import make_missing_assets
from pipeline.config.load import ConfigError, RunConfig
from pipeline.console import CommandResult, format_time
from pipeline.environment import provenance
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.sample_videos.sample import SampleSummary


_MAX_PROMPT_CHARS = 60
_MAX_PROMPT_BYTES = 120
"""Limit of the prompt in a file name, in UTF-8; file systems allow 255 bytes for the name."""


def file_stem(source: str, prompt: str, seed: int) -> str:
    """A readable file name; a truncated prompt ends in a hash of the whole prompt.

    Args:
        source: the run's name, or `base`.
        prompt: any text.
        seed: seed of the noise.
    """
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")
    short = (
        words[:_MAX_PROMPT_CHARS].encode()[:_MAX_PROMPT_BYTES].decode(errors="ignore").strip("-")
    )
    if short != words:
        short += f"-{hashlib.sha256(prompt.encode(errors='surrogateescape')).hexdigest()[:6]}"
    return f"{source}-{short or 'video'}-seed{seed}"


@contextmanager
def claim_new_file(folder: Path, stem: str) -> Iterator[Path]:
    """Claim `<stem>.mp4`, or the first free `<stem>-<number>.mp4`; creates the folder if missing.

    Yields:
        An empty file that no other process gets; deleted afterwards if still empty.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        file = folder / (f"{stem}.mp4" if number == 1 else f"{stem}-{number}.mp4")
        if file.with_suffix(".json").exists():
            continue
        try:
            file.open("xb").close()
        except FileExistsError:
            continue
        with _remove_if_empty(file):
            yield file
        return


@contextmanager
def claim_named_file(file: Path, *, overwrite: bool) -> Iterator[Path]:
    """Claim the mp4 named by the user and its JSON file; creates the folder if missing.

    Yields:
        The file: empty, or unchanged with `overwrite`. Deleted afterwards if empty.

    Raises:
        ConfigError: one of the two files exists.
        OSError: the folder cannot be written to.
    """
    existing = [path for path in (file, file.with_suffix(".json")) if path.exists()]
    if existing and not overwrite:
        raise ConfigError(f"{existing[0]} already exists; give another --out, or --overwrite")
    file.parent.mkdir(parents=True, exist_ok=True)
    _check_writable(file.parent)
    file.open("ab").close()
    with _remove_if_empty(file):
        yield file


def _check_writable(folder: Path) -> None:
    """Check that the folder accepts new files: a video is written to a temporary file in it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextmanager
def _remove_if_empty(file: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if file.is_file() and file.stat().st_size == 0:
            file.unlink()


def run(
    config: RunConfig,
    progress: Progress,
    *,
    prompts: Sequence[str],
    image: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    run_dir: Path | None = None,
    base_only: bool = False,
) -> CommandResult:
    """Sample a video for each prompt; a JSON file beside it records the settings.

    Output files are claimed, and checked to be writable, before any model is loaded.

    Args:
        config: The whole configuration.
        progress: Shows loading and denoising steps.
        prompts: Text prompts; `@file` is replaced by the lines of that file.
        image: The first frame, for image-to-video models.
        out: The mp4 of a single prompt; None makes a name from run, prompt and seed in
            `config.outputs`, numbered if taken.
        overwrite: Let `out` replace an existing file.
        run_dir: The run; None uses the newest finished run of this base model in the parent folder
            of `config.train.run_dir`.
        base_only: Use the base model without a run's weights.
    """
    prompts = _read_prompts(prompts)
    _check_options(len(prompts), out, overwrite, run_dir, base_only)
    from stages.sample_videos.sample import image_mismatch, sample_videos

    make_missing_assets(config, progress, reads=("cogvideox",))
    if (mismatch := image_mismatch(config.model, image)) is not None:
        raise ConfigError(mismatch)
    if not base_only and run_dir is None:
        run_dir = _newest_run(config)
    source = run_dir.name if run_dir else "base"
    with ExitStack() as claims:
        outs = [
            claims.enter_context(
                claim_new_file(config.outputs, file_stem(source, prompt, config.sample.seed))
                if out is None
                else claim_named_file(out, overwrite=overwrite)
            )
            for prompt in prompts
        ]
        drawn = []
        for summary in sample_videos(
            config.sample,
            config.model,
            config.data,
            run_dir=run_dir,
            prompts=prompts,
            image=image,
            outs=outs,
            progress=progress,
        ):
            drawn.append(summary)
            _write_record(config, summary, image)
    return _answer(config, drawn, image)


def _read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts, with each `@file` replaced by the file's lines."""
    prompts: list[str] = []
    for text in given:
        if text.startswith("@"):
            prompts += _lines_of(text[1:])
        elif os.path.isfile(text):  # noqa: PTH113  Path.is_file raises on a long prompt
            raise ConfigError(
                f"--prompt {text} is a file; --prompt @{text} samples a video for each of its lines"
            )
        else:
            prompts.append(text)
    return prompts


def _lines_of(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the prompts of --prompt @{file}: {error}") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"--prompt @{file}: the file holds no prompts; write one per line")
    return lines


def _check_options(
    num_prompts: int, out: Path | None, overwrite: bool, run_dir: Path | None, base_only: bool
) -> None:
    if base_only and run_dir is not None:
        raise ConfigError("--base uses the base model without a run; remove --run")
    if out is not None and out.suffix != ".mp4":
        raise ConfigError(f"--out must end in .mp4, got {out}")
    if out is not None and num_prompts > 1:
        raise ConfigError(
            f"--out names one video, but there are {num_prompts} prompts; remove it, and set "
            "outputs=FOLDER instead"
        )
    if overwrite and out is None:
        raise ConfigError("--overwrite needs --out; generated names never replace a file")


def _write_record(config: RunConfig, summary: SampleSummary, image: Path | None) -> None:
    record = redacted(_data(config, summary, image)) | {"made_with": provenance()}
    text = json.dumps(record, indent=1)
    file = summary.out.with_suffix(".json")
    with add_path_to_errors(file):
        file.write_text(text + "\n", "utf-8")


def _data(config: RunConfig, summary: SampleSummary, image: Path | None) -> dict[str, Any]:
    return {
        "video": str(summary.out),
        "prompt": summary.prompt,
        "image": None if image is None else str(image),
        "run": None if summary.run_dir is None else str(summary.run_dir),
        "weights": summary.weights,
        "model": config.model.path,
        "num_frames": summary.num_frames,
        "height": summary.height,
        "width": summary.width,
        "fps": summary.fps,
        "sample": config.sample.model_dump(mode="json"),
        "seconds": round(summary.seconds, 3),
    }


def _answer(config: RunConfig, drawn: Sequence[SampleSummary], image: Path | None) -> CommandResult:
    first = drawn[0]
    size = f"{first.num_frames} frames of {first.width}x{first.height}"
    rows = [("prompt", summary.prompt) for summary in drawn]
    rows += [
        ("weights", str(first.run_dir) if first.run_dir else "the base model's own"),
        ("video" if len(drawn) == 1 else "videos", f"{size} at {first.fps:g} frames/s"),
        ("steps, guidance", f"{config.sample.steps}, {config.sample.guidance:g}"),
        ("seed", str(config.sample.seed)),
        ("time", format_time(sum(summary.seconds for summary in drawn))),
    ]
    data = [_data(config, summary, image) for summary in drawn]
    return CommandResult(
        title=f"sampled with {config.name}",
        rows=rows,
        data=data[0] if len(data) == 1 else {"videos": data},
        notes=[str(summary.out) for summary in drawn],
    )


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
