"""Which sample videos the page of a run carries within itself, and which it only links to."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from stages.train_student.report.records import Drawing

MOST_BYTES = 24_000_000
"""Of all videos within a page, before base64 makes them a third larger: a browser opens it at
once, and it can still be sent by mail."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A video of the page."""

    drawing: Drawing
    source: str
    """A data URL, or the file's place beside the page."""
    embedded: bool


def first_and_newest(drawings: Sequence[Drawing]) -> dict[str, list[Drawing]]:
    """Each prompt's earliest and latest drawing whose file is there, as the prompts come."""
    of_prompt: dict[str, list[Drawing]] = {}
    for drawing in drawings:
        if drawing.file.is_file():
            of_prompt.setdefault(drawing.prompt, []).append(drawing)
    return {
        prompt: drawn if len(drawn) == 1 else [drawn[0], drawn[-1]]
        for prompt, drawn in of_prompt.items()
    }


def embed(
    chosen: dict[str, list[Drawing]], *, most_bytes: int = MOST_BYTES
) -> dict[str, list[Shown]]:
    """Read the videos as long as they fit, the newest of every prompt before any older one."""
    left = most_bytes
    urls: dict[str, str] = {}
    newest = [drawn[-1] for drawn in chosen.values()]
    older = [drawing for drawn in chosen.values() for drawing in drawn[:-1]]
    for drawing in (*newest, *older):
        size = drawing.file.stat().st_size
        if size <= left:
            left -= size
            data = base64.b64encode(drawing.file.read_bytes()).decode("ascii")
            urls[str(drawing.file)] = f"data:video/mp4;base64,{data}"
    return {
        prompt: [
            Shown(
                drawing=drawing,
                source=urls.get(str(drawing.file), "/".join(("samples", *drawing.file.parts[-2:]))),
                embedded=str(drawing.file) in urls,
            )
            for drawing in drawn
        ]
        for prompt, drawn in chosen.items()
    }
