"""The HTML page of an evaluation: means with intervals, and the videos of both sides.

One file without network access. Videos are linked, not embedded: the page plays them as long as
they keep their place relative to it.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cache_schema.shown_text import escape_html
from stages.evaluate.evaluate import Evaluation, SideScores
from stages.evaluate.videos import Video
from stages.video_scores.score import Score

_COLOURS = ("#2f6f9f", "#c8642b")

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1f2733;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { background: #fff; border-bottom: 1px solid #dfe3e8; padding: 24px 0 16px; }
header > *, main { max-width: 1280px; margin: 0 auto; padding: 0 24px; }
h1 { font-size: 24px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 32px 0 8px; }
.note { color: #667080; font-size: 13px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; font-size: 12.5px; }
th, td { text-align: left; padding: 4px 9px; border: 1px solid #dfe3e8; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pair { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 12px 16px;
  margin: 12px 0; }
.pair p { margin: 0 0 8px; font-weight: 500; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; }
video { width: 100%; background: #000; border-radius: 4px; }
figure { margin: 0; } select { font: inherit; padding: 2px 6px; margin-right: 16px; }
.plot { max-width: 100%; background: #fff; border: 1px solid #dfe3e8; padding: 8px; }
"""

_SORT = """
const pairs = document.getElementById("pairs");
const score = document.getElementById("score"), by = document.getElementById("by");
function sort() {
  const better = score.selectedOptions[0].dataset.better;
  const rows = [...pairs.children].map(row => {
    const values = JSON.parse(row.dataset.values)[score.value] || [];
    const known = v => typeof v === "number";
    const index = Number(by.value);
    const value = index < 0 ? (known(values[0]) && known(values[1]) ? values[0] - values[1] : null)
                            : (known(values[index]) ? values[index] : null);
    return [value, row];
  });
  const sign = better === "lower" ? -1 : 1;
  rows.sort((a, b) => a[0] === null ? (b[0] === null ? 0 : 1) : b[0] === null ? -1
                      : sign * (a[0] - b[0]));
  rows.forEach(([, row]) => pairs.append(row));
}
score.addEventListener("change", sort);
by.addEventListener("change", sort);
sort();
"""


def evaluation_page(evaluation: Evaluation, page: Path, *, subtitle: str) -> str:
    """Make the page.

    Args:
        evaluation: The scores.
        page: Path of the page, to which the videos' paths are made relative.
        subtitle: One line on the settings.
    """
    names = " against ".join(one.side.name for one in evaluation.sides)
    script = base64.b64encode(hashlib.sha256(_SORT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src 'self' file:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{script}'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape_html(names)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape_html(names)}</h1><p class="note">{escape_html(subtitle)}</p></header>
<main>
<h2>Scores</h2>
{_table(evaluation)}
<h2>Means with 95% intervals</h2>
{_plot(evaluation)}
<h2>Videos</h2>
{_videos(evaluation, page.parent)}
{_problems(evaluation)}
</main>
<script>{_SORT}</script>
</body>
</html>
"""


def _table(evaluation: Evaluation) -> str:
    heads = ["score", "unit", "better"]
    for one in evaluation.sides:
        heads.append(f"{one.side.name}: mean [95% interval], videos")
    if evaluation.differences:
        heads += ["difference [95% interval]", "pairs won"]
    rows = []
    for score in evaluation.scores:
        cells = [
            f'<td title="{escape_html(score.description)}">{escape_html(score.name)}</td>',
            f"<td>{escape_html(score.unit)}</td>",
            f"<td>{escape_html(score.better or '')}</td>",
        ]
        cells += [
            f'<td class="number">{escape_html(mean.text)}</td>'
            for mean in evaluation.means[score.name]
        ]
        if found := evaluation.differences.get(score.name):
            cells.append(f'<td class="number">{escape_html(found.difference.text)}</td>')
            won = "" if found.win_rate is None else f"{found.win_rate:.0%}"
            cells.append(f'<td class="number">{won}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape_html(name)}</th>" for name in heads)
    table = (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    notes = []
    if evaluation.motion is not None:
        notes.append(
            f"motion distance (squared MMD of Gram-flow statistics): {evaluation.motion.text}"
        )
    if evaluation.vbench is not None:
        notes += [f"{name}: {text}" for name, text in evaluation.vbench.rows]
        notes += evaluation.vbench.notes
    lines = [f'<p class="note">{escape_html(note)}</p>' for note in notes]
    return table + "".join(lines) + _distances(evaluation) + _feature_distances(evaluation)


def _distances(evaluation: Evaluation) -> str:
    """The distances of each side to the reference."""
    if (tracked := evaluation.reference) is None:
        return ""
    heads = ["distance", *(one.side.name for one in evaluation.sides)]
    head = "".join(f"<th>{escape_html(name)}</th>" for name in heads)
    rows = ""
    for name, of_sides in evaluation.to_reference.items():
        cells = "".join(f'<td class="number">{escape_html(one.text)}</td>' for one in of_sides)
        rows += f"<tr><td>{escape_html(name)}</td>{cells}</tr>"
    count = len(tracked.reference.captions)
    title = f"Distances to the reference {tracked.reference.name} ({count} clips)"
    return (
        f'<h2>{escape_html(title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _feature_distances(evaluation: Evaluation) -> str:
    """The distances over the features of a network, and what they depend on."""
    if (features := evaluation.features) is None:
        return ""
    rows = "".join(
        f'<tr><td>{escape_html(name)}</td><td class="number">{escape_html(text)}</td></tr>'
        for name, text in features.rows
    )
    return (
        f'<h2>Feature distances</h2><p class="note">{escape_html(features.protocol.text)}</p>'
        f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
    )


def _plot(evaluation: Evaluation) -> str:
    """Means and intervals of each score as small plots, as an SVG in the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    scores = [
        score
        for score in evaluation.scores
        if any(not math.isnan(mean.mean) for mean in evaluation.means[score.name])
    ]
    if not scores:
        return '<p class="note">No score could be computed.</p>'
    out = io.BytesIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "evaluation"}
    with rc_context(settings):
        rows = -(-len(scores) // 4)
        figure = Figure(figsize=(11, 1.5 * rows + 0.4), layout="constrained")
        for number, score in enumerate(scores):
            axes = figure.add_subplot(rows, 4, number + 1)
            _plot_score(axes, score, evaluation)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img class="plot" alt="means" src="data:image/svg+xml;base64,{data}">'


def _plot_score(axes: Any, score: Score, evaluation: Evaluation) -> None:
    names = [one.side.name for one in evaluation.sides]
    for row, mean in enumerate(evaluation.means[score.name]):
        colour = _COLOURS[row % len(_COLOURS)]
        if mean.low is not None and mean.high is not None:
            axes.plot([mean.low, mean.high], [row, row], color=colour, linewidth=2)
        if not math.isnan(mean.mean):
            axes.plot([mean.mean], [row], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    arrow = {"higher": " (higher is better)", "lower": " (lower is better)"}.get(
        score.better or "", ""
    )
    axes.set_title(f"{score.name}{arrow}", fontsize=8.5)
    axes.tick_params(length=0, labelsize=8)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=4)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _videos(evaluation: Evaluation, folder: Path) -> str:
    options = "".join(
        f'<option value="{score.name}" data-better="{score.better or ""}">{score.name}</option>'
        for score in evaluation.scores
    )
    orders = [
        f'<option value="{number}">{escape_html(one.side.name)}, worst first</option>'
        for number, one in enumerate(evaluation.sides)
    ]
    if evaluation.pairs:
        orders.insert(0, '<option value="-1">difference, worst first</option>')
    first = evaluation.sides[0]
    groups: Sequence[tuple[Video, ...]] = evaluation.pairs or [
        (video,) for video in first.side.videos
    ]
    rows = "".join(_row(evaluation, group, folder) for group in groups)
    return (
        f'<p>Sort by <select id="score">{options}</select>'
        f'<select id="by">{"".join(orders)}</select></p><div id="pairs">{rows}</div>'
    )


def _row(evaluation: Evaluation, group: Sequence[Video], folder: Path) -> str:
    values = {
        score.name: [
            _json_number(one.values[video.key].get(score.name))
            for one, video in zip(evaluation.sides, group, strict=False)
        ]
        for score in evaluation.scores
    }
    cells = "".join(
        _cell(one, video, folder, evaluation.scores)
        for one, video in zip(evaluation.sides, group, strict=False)
    )
    title = group[0].prompt or group[0].key
    seed = "" if group[0].number is None else f" (seed {group[0].number})"
    return (
        f'<div class="pair" data-values="{html.escape(json.dumps(values), quote=True)}">'
        f'<p>{escape_html(title + seed)}</p><div class="sides">{cells}</div></div>'
    )


def _cell(one: SideScores, video: Video, folder: Path, scores: Sequence[Score]) -> str:
    source = quote(Path(os.path.relpath(video.path, folder)).as_posix())
    known: Mapping[str, float] = one.values[video.key]
    listed = ", ".join(
        f"{score.name} {known[score.name]:.3g}"
        for score in scores
        if not math.isnan(known.get(score.name, math.nan))
    )
    problem = one.problems.get(video.key, "")
    return (
        f'<figure><video src="{escape_html(source)}" controls loop muted preload="metadata" '
        f'playsinline></video><figcaption class="note"><b>{escape_html(one.side.name)}</b> '
        f"{escape_html(listed)} {escape_html(problem)}</figcaption></figure>"
    )


def _json_number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _problems(evaluation: Evaluation) -> str:
    rows: list[tuple[str, str, str]] = []
    for one in evaluation.sides:
        name = one.side.name
        rows += [(name, key, why) for key, why in sorted(one.problems.items())]
        rows += [
            (name, key, f"no flow_divergence: {why}") for key, why in sorted(one.unmatched.items())
        ]
    if (tracked := evaluation.reference) is not None:
        name = tracked.reference.name
        rows += [(name, key, why) for key, why in sorted(tracked.problems.items())]
    if evaluation.features is not None:
        rows += evaluation.features.problem_rows
    rows += [("", key, "no partner on the other side") for key in evaluation.unpaired]
    if not rows:
        return ""
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape_html(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<h2>Videos without scores or partner</h2><table>{lines}</table>"
