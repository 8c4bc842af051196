"""HTML of the report page: all external text is escaped, and no resources are fetched."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from cache_schema.schema import flatten
from cache_schema.shown_text import escape_html
from stages.train_student.report.charts import Chart, as_svg
from stages.train_student.report.figures import Figure
from stages.train_student.report.records import Row, SampleVideo

_MAX_ROWS = 200

MAX_BYTES = 24_000_000
"""Limit for all embedded videos, before base64 adds a third: the page opens quickly, and can be
mailed."""

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
)
"""Prevents unescaped text, should there be any, from loading resources or running scripts."""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title>
<style>
:root { --ink: #1f2733; --soft: #667080; --line: #dfe3e8; --back: #f6f7f9; --accent: #2f6f9f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { background: #fff; border-bottom: 1px solid var(--line); padding: 28px 0 20px; }
header > *, main { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
h1 { font-size: 26px; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p { color: var(--soft); margin-top: 4px; overflow-wrap: anywhere; }
main { padding-bottom: 60px; }
h2 { font-size: 18px; font-weight: 650; margin: 36px 0 10px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 4px; }
.note, figcaption { color: var(--soft); font-size: 13px; margin: 2px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px;
  margin-top: 24px; }
.tile, .charts figure, .prompt, details { background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: 14px 16px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .note { overflow-wrap: anywhere; }
.tile .value { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr));
  gap: 14px; }
.charts img { width: 100%; display: block; }
.prompt { margin-bottom: 14px; }
.prompt p { margin: 0 0 10px; font-weight: 500; overflow-wrap: anywhere; }
.prompt > div { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
video { width: 100%; display: block; border-radius: 4px; background: #000; }
.far { padding: 12px; border: 1px dashed var(--line); border-radius: 4px; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 13px; background: #fff;
  border: 1px solid var(--line); }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.facts { border: 0; }
.facts th { font-weight: 500; color: var(--soft); width: 34%; }
details { margin-bottom: 10px; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { body { background: #fff; } .charts figure, .prompt { break-inside: avoid; } }
</style>
</head>
<body>
<header><h1>$title</h1><p>$subtitle</p></header>
<main>
$sections
</main>
</body>
</html>
""")


@dataclass(frozen=True, kw_only=True, slots=True)
class PageVideo:
    """A video on the page."""

    sample: SampleVideo
    source: str
    """A data URL, or the file's path relative to the page."""
    embedded: bool


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A complete, self-contained page."""
    return _PAGE.substitute(
        policy=_CONTENT_SECURITY_POLICY,
        title=escape_html(title),
        subtitle=escape_html(subtitle),
        sections="".join(sections),
    )


def section(title: str, *content: str, note: str = "") -> str:
    """A heading with content; empty if there is no content."""
    if not any(content):
        return ""
    paragraph = f'<p class="note">{escape_html(note)}</p>' if note else ""
    return f"<section><h2>{escape_html(title)}</h2>{paragraph}{''.join(content)}</section>\n"


def tiles(figures: Iterable[Figure]) -> str:
    """Key figures as tiles."""
    made = [
        f'<div class="tile"><div class="name">{escape_html(figure.name)}</div>'
        f'<div class="value">{escape_html(figure.value)}</div>'
        f'<div class="note">{escape_html(figure.note)}</div></div>'
        for figure in figures
    ]
    return f'<div class="tiles">{"".join(made)}</div>\n' if made else ""


def charts(chosen: Iterable[Chart]) -> str:
    """Plots in a grid, each as a separate image, so that ids within the SVGs cannot clash."""
    made = []
    for chart in chosen:
        data = base64.b64encode(as_svg(chart)).decode("ascii")
        made.append(
            f"<figure><h3>{escape_html(chart.title)}</h3>"
            f'<img alt="{escape_html(chart.title)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{escape_html(chart.caption)}</figcaption></figure>"
        )
    return f'<div class="charts">{"".join(made)}</div>\n' if made else ""


def videos(shown: Mapping[str, Sequence[PageVideo]], best: int | None = None) -> str:
    """One row per prompt with its videos; those of step `best` are named as such."""
    made = []
    for prompt, of_prompt in shown.items():
        cells = "".join(_video(one, best) for one in of_prompt)
        made.append(f'<div class="prompt"><p>{escape_html(prompt)}</p><div>{cells}</div></div>')
    return "".join(made)


def _video(shown: PageVideo, best: int | None) -> str:
    step = shown.sample.step
    source = escape_html(shown.source)
    caption = "base model" if step == 0 else f"step {escape_html(step)}"
    caption += ", the best checkpoint" if step == best else ""
    if not shown.embedded:
        link = f'<a href="{source}">{source}</a>'
        return f'<figure class="far">{link}<figcaption>{caption}</figcaption></figure>'
    player = f'<video src="{source}" controls loop muted autoplay playsinline></video>'
    return f"<figure>{player}<figcaption>{caption}</figcaption></figure>"


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of the newest rows; missing values are left empty."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape_html(name)}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{escape_html(_text(row.get(name)))}</td>" for name in columns)
        + "</tr>"
        for row in rows[-_MAX_ROWS:]
    )
    num_hidden = len(rows) - _MAX_ROWS
    note = f'<p class="note">{num_hidden} earlier rows are not shown.</p>' if num_hidden > 0 else ""
    return f"{note}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values; nested ones have dotted names."""
    rows = "".join(
        f"<tr><th>{escape_html(name)}</th><td>{escape_html(_text(value))}</td></tr>"
        for name, value in flatten(values).items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def folded(title: str, content: str) -> str:
    """Collapsible content."""
    if not content:
        return ""
    return f"<details><summary>{escape_html(title)}</summary>{content}</details>"


def text(content: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape_html(content)}</pre>" if content else ""


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(one) for one in value)
    return str(value)


def select_videos(
    samples: Sequence[SampleVideo], best: int | None = None
) -> dict[str, list[SampleVideo]]:
    """The first and newest existing video of each prompt, and that of step `best`.

    In the order of the prompts, then of the steps.
    """
    of_prompt: dict[str, list[SampleVideo]] = {}
    for sample in samples:
        if sample.file.is_file():
            of_prompt.setdefault(sample.prompt, []).append(sample)
    return {
        prompt: [
            video
            for number, video in enumerate(videos)
            if number in (0, len(videos) - 1) or video.step == best
        ]
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
