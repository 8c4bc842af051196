"""HTML of the report page: all external text is escaped, and no resources are fetched."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cache_schema.shown_text import visible, without_credentials
from stages.train_student.report.curves import Picture, as_svg
from stages.train_student.report.figures import Figure
from stages.train_student.report.records import Row
from stages.train_student.report.style import STYLE
from stages.train_student.report.videos import PageVideo

_MAX_ROWS = 200

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
)
"""Prevents unescaped text, should there be any, from loading resources or running scripts."""


def escape(value: object) -> str:
    """Escape a value for use in elements and quoted attributes."""
    return html.escape(visible(without_credentials(str(value))), quote=True)


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A complete, self-contained page."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_CONTENT_SECURITY_POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""


def section(title: str, *content: str, note: str = "") -> str:
    """A heading with content; empty if there is no content."""
    if not any(content):
        return ""
    paragraph = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{''.join(content)}</section>\n"


def tiles(figures: Iterable[Figure]) -> str:
    """Key figures as tiles."""
    made = [
        f'<div class="tile"><div class="name">{escape(figure.name)}</div>'
        f'<div class="value">{escape(figure.value)}</div>'
        f'<div class="note">{escape(figure.note)}</div></div>'
        for figure in figures
    ]
    return f'<div class="tiles">{"".join(made)}</div>\n' if made else ""


def pictures(chosen: Iterable[Picture]) -> str:
    """Plots in a grid, each as a separate image, so that ids within the SVGs cannot clash."""
    made = []
    for picture in chosen:
        data = base64.b64encode(as_svg(picture)).decode("ascii")
        made.append(
            f"<figure><h3>{escape(picture.title)}</h3>"
            f'<img alt="{escape(picture.title)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        )
    return f'<div class="pictures">{"".join(made)}</div>\n' if made else ""


def videos(shown: Mapping[str, Sequence[PageVideo]]) -> str:
    """One row per prompt: its first and newest video."""
    made = []
    for prompt, of_prompt in shown.items():
        cells = "".join(_video(one) for one in of_prompt)
        made.append(f'<div class="prompt"><p>{escape(prompt)}</p><div>{cells}</div></div>')
    return "".join(made)


def _video(shown: PageVideo) -> str:
    step = shown.sample.step
    source = escape(shown.source)
    caption = "base model" if step == 0 else f"step {escape(step)}"
    if not shown.embedded:
        link = f'<a href="{source}">{source}</a>'
        return f'<figure class="far">{link}<figcaption>{caption}</figcaption></figure>'
    player = f'<video src="{source}" controls loop muted autoplay playsinline></video>'
    return f"<figure>{player}<figcaption>{caption}</figcaption></figure>"


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of the newest rows; missing values are left empty."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(row.get(name)))}</td>" for name in columns) + "</tr>"
        for row in rows[-_MAX_ROWS:]
    )
    num_hidden = len(rows) - _MAX_ROWS
    note = f'<p class="note">{num_hidden} earlier rows are not shown.</p>' if num_hidden > 0 else ""
    return f"{note}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values; nested ones have dotted names."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>"
        for name, value in _flat(values)
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def folded(title: str, content: str) -> str:
    """Collapsible content."""
    if not content:
        return ""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def text(content: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(content)}</pre>" if content else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(one) for one in value)
    return str(value)
