"""Files of an evaluation: scores.jsonl, scores.csv, summary.json and index.html."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_schema import JSON
from cache_schema.atomic_io import make_directories, write_atomic
from stages.evaluate.evaluate import Evaluation, SideScores
from stages.evaluate.page import evaluation_page
from stages.evaluate.videos import Video
from stages.video_scores.divergence import DIVERGENCE
from stages.video_scores.score import Score
from stages.video_scores.vbench.dimensions import VBENCH
from stages.video_scores.vbench.long import Protocol
from stages.video_scores.vbench.results import (
    INFO_SUFFIX,
    RESULTS_SUFFIX,
    full_info_json,
    results_json,
)

SCORES_FILE = "scores.jsonl"
TABLE_FILE = "scores.csv"
SUMMARY_FILE = "summary.json"
PAGE_FILE = "index.html"


def write_evaluation(
    evaluation: Evaluation,
    out: Path,
    *,
    settings: Mapping[str, JSON],
    made_with: Mapping[str, JSON],
) -> Path:
    """Write all files, each atomically; equal evaluations give equal scores and summaries.

    Args:
        evaluation: The scores.
        out: Folder; created if missing.
        settings: What changes the scores, recorded in the summary.
        made_with: Versions of this program and its libraries, recorded in the summary.

    Returns:
        The page.
    """
    make_directories(out)
    summary = {**summary_of(evaluation), "settings": dict(settings), "made_with": dict(made_with)}
    page = out / PAGE_FILE
    texts = {
        SCORES_FILE: "".join(
            f"{json.dumps(row, ensure_ascii=False)}\n" for row in _rows(evaluation)
        ),
        TABLE_FILE: _table(evaluation),
        SUMMARY_FILE: json.dumps(summary, ensure_ascii=False, indent=1) + "\n",
        PAGE_FILE: evaluation_page(evaluation, page, subtitle=_subtitle(settings)),
    }
    if evaluation.vbench is not None:
        for one, vbench in zip(evaluation.sides, evaluation.vbench.sides, strict=True):
            if vbench.protocol is not None:
                texts |= _vbench_files(one, vbench.protocol)
    for name, text in texts.items():
        write_atomic(out / name, text.encode("utf-8", "backslashreplace"))
    return page


def summary_of(evaluation: Evaluation) -> dict[str, Any]:
    """The means, intervals and differences as JSON values."""
    return {
        "sides": [
            {
                "name": one.side.name,
                "folder": str(one.side.folder),
                "videos": len(one.side.videos),
                "problems": dict(sorted(one.problems.items())),
                "unmatched": dict(sorted(one.unmatched.items())),
            }
            for one in evaluation.sides
        ],
        "pairs": len(evaluation.pairs),
        "unpaired": list(evaluation.unpaired),
        "motion_distance": None if evaluation.motion is None else asdict(evaluation.motion),
        "reference": _reference_summary(evaluation),
        "features": None if evaluation.features is None else evaluation.features.summary,
        "vbench": None if evaluation.vbench is None else evaluation.vbench.as_dict(),
        "scores": {score.name: _summary(score, evaluation) for score in evaluation.scores},
    }


def _reference_summary(evaluation: Evaluation) -> dict[str, Any] | None:
    if (tracked := evaluation.reference) is None:
        return None
    return {
        "name": tracked.reference.name,
        "path": str(tracked.reference.path),
        "clips": len(tracked.reference.captions),
        "problems": dict(sorted(tracked.problems.items())),
        "distances": {
            name: [asdict(distance) for distance in of_sides]
            for name, of_sides in evaluation.to_reference.items()
        },
    }


def _summary(score: Score, evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.differences.get(score.name)
    return {
        "unit": score.unit,
        "better": score.better,
        "means": [mean.as_dict() for mean in evaluation.means[score.name]],
        "difference": None if found is None else found.as_dict(),
    }


def _rows(evaluation: Evaluation) -> Iterator[dict[str, JSON]]:
    """One row per video and score."""
    for one, video, score, value in _values(evaluation):
        yield {
            "side": one.side.name,
            "video": video.key,
            "prompt": video.prompt,
            "seed": video.number,
            "score": score.name,
            "value": None if math.isnan(value) else value,
            "problem": (one.unmatched if score in DIVERGENCE else {}).get(
                video.key, one.problems.get(video.key)
            ),
        }


def _values(evaluation: Evaluation) -> Iterator[tuple[SideScores, Video, Score, float]]:
    for one in evaluation.sides:
        for video in one.side.videos:
            for score in evaluation.scores:
                yield one, video, score, one.values[video.key].get(score.name, math.nan)


def _table(evaluation: Evaluation) -> str:
    """A row per video, a column per score; empty where there is no value."""
    names = [score.name for score in evaluation.scores]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["side", "video", "prompt", "seed", *names])
    for one in evaluation.sides:
        for video in one.side.videos:
            values = [one.values[video.key].get(name, math.nan) for name in names]
            shown = ["" if math.isnan(value) else repr(value) for value in values]
            seed = "" if video.number is None else video.number
            writer.writerow([one.side.name, video.key, video.prompt or "", seed, *shown])
    return out.getvalue()


def _vbench_files(one: SideScores, protocol: Protocol) -> dict[str, str]:
    """VBench's own files of one side, whose videos follow one protocol."""
    dimensions = {
        score.name: {
            str(video.path): one.values[video.key].get(score.name, math.nan)
            for video in one.side.videos
        }
        for score in VBENCH
    }
    measured = [
        name
        for name, values in dimensions.items()
        if not all(math.isnan(value) for value in values.values())
    ]
    videos = [(str(video.path), video.prompt) for video in one.side.videos]
    files = {f"{one.side.name}{RESULTS_SUFFIX}": results_json(dimensions, protocol)}
    info = full_info_json(videos, measured)
    if info is not None:
        files[f"{one.side.name}{INFO_SUFFIX}"] = info
    return files


def _subtitle(settings: Mapping[str, JSON]) -> str:
    shown = {
        name: " and ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in settings.items()
        if not isinstance(value, dict)
    }
    return "; ".join(f"{name}: {value}" for name, value in shown.items())
