"""The videos to generate: prompts, seeds and first frames, also from prompt files."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema.checksummed_json import parse_json
from cache_schema.shown_text import first_few
from stages.files.text import read_text
from stages.sample_videos.config import MAX_SEED

MAX_FILE_BYTES = 64 << 20
"""Largest prompt file that is read."""

COLUMNS = ("prompt", "image", "seed")
"""Columns of a CSV, members of a line of JSON; only the prompt is required."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """A prompt, with an image and a seed if it has its own."""

    prompt: str
    image: Path | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRequest:
    """One video to generate."""

    prompt: str
    seed: int
    image: Path | None = None
    """First frame; image-to-video models only."""


def read_prompt_file(path: Path) -> list[PromptRow]:
    """Read prompts from a .txt (one per line), .csv or .jsonl; blank lines are skipped.

    CSV columns and JSON members are `COLUMNS`; relative images are looked up beside the file.

    Raises:
        ValueError: Another suffix, no prompts, or a bad line, which is named.
        OSError: The file cannot be read.
    """
    readers = {".txt": _rows_of_text, ".csv": _rows_of_csv, ".jsonl": _rows_of_json}
    if path.suffix not in readers:
        raise ValueError(f"a prompt file ends in .txt, .csv or .jsonl, got {path}")
    text = read_text(path, MAX_FILE_BYTES).removeprefix("\ufeff")
    rows = []
    for number, fields in readers[path.suffix](text, path):
        try:
            rows.append(_row(fields, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no prompts; write one per line")
    return rows


def _rows_of_text(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _rows_of_csv(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "prompt" not in header or len(set(header)) < len(header):
            raise ValueError(f"{path} has the columns {header}, expected {list(COLUMNS)}")
        for cells in reader:
            if len(cells) > len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells in {len(header)} columns; "
                    "put prompts with commas in quotes"
                )
            if any(cell.strip() for cell in cells):
                # An empty cell is no value.
                yield (
                    reader.line_num,
                    {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()},
                )
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _rows_of_json(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path}, line {number} must be an object with {list(COLUMNS)}")
        yield number, {name: value for name, value in fields.items() if value is not None}


def _row(fields: dict[str, Any], folder: Path) -> PromptRow:
    if unknown := sorted(fields.keys() - set(COLUMNS)):
        raise ValueError(f"unknown {first_few(unknown, 3)}; expected {', '.join(COLUMNS)}")
    prompt, image = fields.get("prompt"), fields.get("image")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("there is no prompt; describe the video")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"image must be a file name, got {image!r:.80}")
    if image is not None and not (folder / image.strip()).is_file():
        raise ValueError(f"there is no image {folder / image.strip()}")
    return PromptRow(
        prompt=prompt.strip(),
        image=None if image is None else folder / image.strip(),
        seed=None if "seed" not in fields else _seed(fields["seed"]),
    )


def _seed(value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if type(number) is not int or not 0 <= number <= MAX_SEED:
        raise ValueError(f"seed must be an integer of 0 or more, got {value!r:.80}")
    return number


def make_requests(
    rows: Sequence[PromptRow], *, seeds: Sequence[int], num: int, image: Path | None
) -> list[VideoRequest]:
    """List the videos of some prompts, in their order; what is listed twice is generated once.

    Args:
        rows: The prompts.
        seeds: Seeds of prompts that have none of their own.
        num: Videos per prompt, with consecutive seeds.
        image: First frame of prompts that have none of their own.

    Raises:
        ValueError: A prompt is empty, several seeds and `num` are combined, or two images have the
            same prompt and seed, so that their videos would have the same name.
    """
    if num > 1 and len(seeds) > 1:
        raise ValueError("--num counts up from one seed; give one --seed, or several without --num")
    requests: dict[tuple[str, int], VideoRequest] = {}
    for row in rows:
        if not row.prompt.strip():
            raise ValueError("the prompt is empty; describe the video")
        for first in seeds if row.seed is None else (row.seed,):
            for seed in range(first, first + num):
                request = VideoRequest(prompt=row.prompt, seed=seed, image=row.image or image)
                earlier = requests.setdefault((row.prompt, seed), request)
                if earlier != request:
                    raise ValueError(
                        f"the prompt {row.prompt!r:.80} has two images with seed {seed}: "
                        f"{earlier.image} and {request.image}; give them different seeds"
                    )
    return list(requests.values())
