"""The HTML page that asks people which of two videos is better."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cache_schema.shown_text import visible

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True, slots=True)
class PageQuestion:
    """What the page knows of a question."""

    id: str
    prompt: str
    left: str
    """Path of a video relative to the page."""
    right: str


def preference_page(page_id: str, questions: Sequence[PageQuestion]) -> str:
    """Make the page; it names no models.

    Args:
        page_id: Distinguishes the answers to this page from those to others.
        questions: In the order in which they are asked.
    """
    shown = [asdict(question) | {"prompt": visible(question.prompt)} for question in questions]
    # "<" is escaped, so that a prompt cannot end the script element.
    text = json.dumps({"page": page_id, "questions": shown}).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text)
