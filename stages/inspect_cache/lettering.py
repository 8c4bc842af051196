"""Type and colours that all pictures share; used by `picture` and `overlay_picture`."""

from collections.abc import Sequence

from PIL import ImageFont

Colour = tuple[int, int, int]

PAPER: Colour = (250, 250, 248)
INK: Colour = (30, 30, 30)
FAINT: Colour = (110, 110, 110)
WARNING: Colour = (200, 30, 30)
"""Of what is not valid."""


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The typeface of all lettering, `size` pixels high."""
    return ImageFont.load_default(size)


def fitted(text: str, width: int, size: int) -> str:
    """`text`, cut where it is wider than `width` pixels."""
    face = font(size)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def packed(clauses: Sequence[str], width: int, size: int) -> list[str]:
    """Lines of comma-parted clauses, each at most `width` pixels wide; a longer clause is cut."""
    face = font(size)
    lines: list[str] = []
    for clause in clauses:
        joined = f"{lines[-1]}, {clause}" if lines else clause
        if lines and face.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(clause)
    return [fitted(line, width, size) for line in lines]
