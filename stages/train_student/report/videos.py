"""Selection of the sample videos that the report page embeds or links."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from stages.train_student.report.records import SampleVideo

MAX_BYTES = 24_000_000
"""Limit for all embedded videos, before base64 adds a third: the page opens quickly, and can be
mailed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageVideo:
    """A video on the page."""

    sample: SampleVideo
    source: str
    """A data URL, or the file's path relative to the page."""
    embedded: bool


def first_and_newest(samples: Sequence[SampleVideo]) -> dict[str, list[SampleVideo]]:
    """The first and newest existing video of each prompt, in the order of the prompts."""
    of_prompt: dict[str, list[SampleVideo]] = {}
    for sample in samples:
        if sample.file.is_file():
            of_prompt.setdefault(sample.prompt, []).append(sample)
    return {
        prompt: videos if len(videos) == 1 else [videos[0], videos[-1]]
        for prompt, videos in of_prompt.items()
    }


def embed(
    chosen: dict[str, list[SampleVideo]], *, max_bytes: int = MAX_BYTES
) -> dict[str, list[PageVideo]]:
    """Embed the videos that fit into `max_bytes`, the newest of each prompt before older ones."""
    bytes_left = max_bytes
    urls: dict[str, str] = {}
    newest = [videos[-1] for videos in chosen.values()]
    older = [sample for videos in chosen.values() for sample in videos[:-1]]
    for sample in (*newest, *older):
        size = sample.file.stat().st_size
        if size <= bytes_left:
            bytes_left -= size
            data = base64.b64encode(sample.file.read_bytes()).decode("ascii")
            urls[str(sample.file)] = f"data:video/mp4;base64,{data}"
    return {
        prompt: [
            PageVideo(
                sample=sample,
                source=urls.get(str(sample.file), "/".join(("samples", *sample.file.parts[-2:]))),
                embedded=str(sample.file) in urls,
            )
            for sample in videos
        ]
        for prompt, videos in chosen.items()
    }
