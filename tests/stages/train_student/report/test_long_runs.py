"""Runs of more steps than a picture has pixels, and than memory should hold rows of."""

import json
import math
import random
import re
import tracemalloc
from xml.etree import ElementTree

import pytest

from stages.train_student.report.charts import as_svg, training_charts
from stages.train_student.report.figures import figures
from stages.train_student.report.records import read_run
from stages.train_student.report.report import write_page

WIDTH, HEIGHT = 6.4 * 72, 2.9 * 72
"""Of a picture, in points."""
LEFT, RIGHT, TOP = 0.115 * WIDTH, 0.975 * WIDTH, 0.055 * HEIGHT
"""Where the axes of a picture lie on it."""
FEW, MANY = 17_000, 500_000


def step_rows(steps, spikes):
    """Rows of losses and of performance; losses are about 1, apart from the spikes."""
    chance = random.Random(0)
    for step in range(1, steps + 1):
        loss = spikes.get(step, 1 + chance.random() / 10)
        clips = [chance.randrange(3) for _ in range(10)]
        means = [loss + part if count else None for part, count in enumerate(clips)]
        losses = {
            "step": step,
            "loss": loss,
            "diffusion": loss,
            "auxiliary": {"lgf": loss} if step > 7 else {},
            "grad_norm": loss,
            "lr": loss,
            "by_timestep": {"count": clips, "diffusion": means},
        }
        speed = {
            "step": step,
            "seconds": loss,
            "wait_seconds": loss / 4,
            "clips_per_second": 8 / loss,
            "peak_memory_bytes": step,
            "share_of_peak": None,
        }
        yield losses, speed


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=lambda n: f"{n}"
)
def long_run(request, tmp_path_factory):
    """Folder, steps, and the step of a spike."""
    steps = request.param
    spike = steps * 7 // 10 + 1
    folder = tmp_path_factory.mktemp("run")
    files = [(folder / name).open("w") for name in ("losses.jsonl", "performance.jsonl")]
    for rows in step_rows(steps, {spike: 1000.0}):
        for file, row in zip(files, rows, strict=True):
            file.write(json.dumps(row) + "\n")
    for file in files:
        file.close()
    (folder / "run.json").write_text("{}")
    return folder, steps, spike


def points_of(svg):
    """Every point of every path that is inside of the axes: none of the grid's."""
    paths = [path.get("d") for path in ElementTree.fromstring(svg).iter() if path.get("d")]
    found = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", " ".join(paths))
    points = [(float(x), float(y)) for x, y in found]
    points = [(x, y if y >= 0 else y + HEIGHT) for x, y in points]  # bands are drawn from below
    return [(x, y) for x, y in points if y > TOP + 1 and LEFT + 1 < x < RIGHT - 1]


def test_one_step_out_of_all_is_in_every_picture(long_run):
    folder, steps, spike = long_run
    charts = {chart.title: chart for chart in training_charts(read_run(folder))}
    for title in ("Total loss", "Local Gram Flow", "Norm of the gradient", "Learning rate"):
        x, y = min(points_of(as_svg(charts[title])), key=lambda point: point[1])
        assert y < TOP + 0.1 * HEIGHT, title
        assert (x - LEFT) / (RIGHT - LEFT) == pytest.approx(spike / steps, abs=0.02), title


def test_figures_of_a_long_run_are_those_of_all_its_rows(long_run):
    folder, steps, spike = long_run
    rows = [losses for losses, _ in step_rows(steps, {spike: 1000.0})]
    run = read_run(folder)
    told = {figure.name: figure for figure in figures(run)}
    few = steps // 20
    last = math.fsum(row["loss"] for row in rows[-few:]) / few
    assert float(told["training loss"].value) == pytest.approx(last, abs=1e-3)
    assert told["steps"].value == f"{steps:,}"
    assert f" for {steps:,} steps, waiting for data 25.0%" in told["a step"].note
    assert len(run.losses.points("lgf")[0]) == steps - 7
    assert run.losses.points("loss")[1].tolist() == [row["loss"] for row in rows]
    quarter = steps // 4
    for part, of_part in (("first quarter", rows[:quarter]), ("last quarter", rows[-quarter:])):
        clips = [row["by_timestep"]["count"] for row in of_part]
        means = [row["by_timestep"]["diffusion"] for row in of_part]
        timesteps, found = run.losses.by_noise[part]["diffusion"]
        assert timesteps.tolist() == list(range(50, 1000, 100))
        for bin_ in range(10):
            pairs = [
                (count[bin_], mean[bin_])
                for count, mean in zip(clips, means, strict=True)
                if mean[bin_] is not None
            ]
            expected = math.fsum(count * mean for count, mean in pairs) / sum(c for c, _ in pairs)
            assert found[bin_] == pytest.approx(expected)


def test_memory_and_page_of_a_long_run_are_small(long_run, tmp_path):
    folder, steps, _ = long_run
    tracemalloc.start()
    run = read_run(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 15e6 + 300 * steps  # rows take 3 kB a step
    page = write_page(run, tmp_path / "page.html")
    assert page.stat().st_size < 1.5e6
