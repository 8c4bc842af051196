"""Font, text fitting and colours shared by all images."""

from collections.abc import Sequence

from PIL import ImageFont

Colour = tuple[int, int, int]

PAPER: Colour = (250, 250, 248)
INK: Colour = (30, 30, 30)
FAINT: Colour = (110, 110, 110)
WARNING: Colour = (200, 30, 30)
"""Marks frames that are not valid."""


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all text, `size` pixels high."""
    return ImageFont.load_default(size)


def truncated(text: str, width: int, size: int) -> str:
    """`text`, truncated with an ellipsis if wider than `width` pixels."""
    face = font(size)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def wrapped(clauses: Sequence[str], width: int, size: int) -> list[str]:
    """Join clauses with commas into lines of at most `width` pixels, truncating longer clauses."""
    face = font(size)
    lines: list[str] = []
    for clause in clauses:
        joined = f"{lines[-1]}, {clause}" if lines else clause
        if lines and face.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(clause)
    return [truncated(line, width, size) for line in lines]
