"""How numbers become curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.train_student.report.charts import Chart, Curve, as_svg, extremes, running_mean
from stages.train_student.report.figures import in_time
from stages.train_student.report.records import MeansByNoise, points


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(0, 8))
def test_a_running_mean_is_the_mean_of_the_neighbours(values, reach):
    found = running_mean(np.array(values), reach)
    for place, value in enumerate(found):
        near = values[max(place - reach, 0) : place + reach + 1]
        assert value == pytest.approx(sum(near) / len(near), abs=1e-9)


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9)), min_size=10, max_size=10)))
def test_means_by_timestep_weigh_every_clip_alike(steps):
    rows = [
        {
            "by_timestep": {
                "count": [count for count, _ in bins],
                "diffusion": [mean if count else None for count, mean in bins],
            }
        }
        for bins in steps
    ]
    made = MeansByNoise()
    made.add([row["by_timestep"] for row in rows[:2]])
    made.add([row["by_timestep"] for row in rows[2:]])
    found = dict(zip(*made.all().get("diffusion", ((), ())), strict=True))
    for part in range(10):
        clips = [mean for bins in steps for _ in range(bins[part][0]) for mean in [bins[part][1]]]
        if clips:
            assert found.pop(100 * part + 50) == pytest.approx(sum(clips) / len(clips))
    assert not found


def test_what_is_no_number_is_left_out_of_a_curve():
    rows = [{"step": step, "x": value} for step, value in enumerate((1.0, None, float("nan"), 4))]
    steps, values = points(rows, lambda row: row["x"])
    assert (steps.tolist(), values.tolist()) == ([0, 3], [1.0, 4.0])


def test_a_long_run_makes_a_picture_no_larger_than_a_short_one():
    def size(steps):
        values = np.random.default_rng(0).random(steps).tolist()
        return len(as_svg(Chart("t", "c", [Curve("loss", (list(range(steps)), values))])))

    assert size(50_000) < 3 * size(300)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=60), st.integers(1, 70))
def test_a_thinned_line_keeps_its_ends_and_every_extreme(values, num_blocks):
    kept = extremes(np.array(values), num_blocks)
    assert {0, len(values) - 1} <= set(kept)
    assert {min(values), max(values)} <= {values[place] for place in kept}
    assert (np.diff(kept) > 0).all()
    assert len(kept) <= 4 * num_blocks


def test_durations_are_told_for_people():
    told = [in_time(seconds) for seconds in (0.213, 12.3, 187, 7500)]
    assert told == ["0.21 s", "12 s", "3 min 07 s", "2 h 05 min"]
