"""How often a run's page is made anew while the run goes on."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from stages.progress import SilentProgress
from stages.train_student.logging.rows import ValidationRow
from stages.train_student.parallel.process_group import World
from stages.train_student.validation import validation
from stages.train_student.validation.validation import PAGE_SHARE, Validation

EVERY, STEPS = 10, 2_000


@pytest.mark.parametrize("seconds_a_step", [0.01, 1.0])
def test_pages_of_a_run_take_a_bounded_share_of_its_time(seconds_a_step, tmp_path, monkeypatch):
    now, made = 1000.0, []

    def draw(run_dir):
        nonlocal now
        seconds = 0.02 + 1e-4 * step  # every page is made from all steps so far
        now += seconds
        made.append((step, seconds))
        if len(made) == 2:
            raise OSError("no space left")

    by_timestep = {"timestep": [500], "diffusion": [1.0]}

    def losses(student, step, note):
        row = ValidationRow(
            step=step, clips=1, diffusion=1.0, auxiliary={}, by_timestep=by_timestep
        )
        return row, []

    monkeypatch.setattr(validation, "write_report", draw)
    monkeypatch.setattr(validation, "time", SimpleNamespace(monotonic=lambda: now))
    looking = Validation(
        None,
        SimpleNamespace(run_dir=tmp_path, steps=STEPS, validation=SimpleNamespace(every=EVERY)),
        losses=losses,
        samples=None,
        best=None,
        trackers=None,
        world=World(rank=0, local_rank=0, size=1, device=torch.device("cpu")),
        progress=SilentProgress(),
        note=lambda text: None,
        check=lambda: None,
    )
    step = 0
    looking.start(0)
    started = now
    for step in range(1, STEPS + 1):
        now += seconds_a_step
        looking.after_step(step)
    during = made[1:]
    assert made[0][0] == 0
    assert sum(seconds for _, seconds in during) <= PAGE_SHARE * (now - started) + during[-1][1]
    longest = made[-1][1] / PAGE_SHARE + 2 * EVERY * seconds_a_step
    for (before, _), (after, _) in pairwise([*made, (STEPS, 0.0)]):
        assert (after - before) * seconds_a_step <= longest, "the page is older than it need be"
    count = len(made)
    looking.write_page()
    assert made[-1][0] == STEPS and len(made) == count + 1
