"""The student that `explore` shows, against what the run's own validation measured."""

import json

import pytest
import torch

from stages.config import BaseModelConfig
from stages.explore.layers import load_layers
from stages.explore.stores import open_cache
from stages.explore.student import RunStudent
from stages.local_gram_flow import gram_flow_loss
from stages.train_student.config import TrainConfig
from stages.train_student.run_folder import held_out_clips

SETTINGS = {"steps": 1, "validation": {"clips": 2, "every": 1, "timesteps": (700,)}}


@pytest.fixture(scope="module")
def run_dir(train, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("explored") / "run"
    train(run_dir, **SETTINGS)
    return run_dir


@pytest.fixture
def student(tiny, run_dir, base_model, cache):
    """Returns a function that opens the run's student."""

    def open_it(base=base_model, **changes):
        return RunStudent(
            run_dir,
            config=TrainConfig(**tiny.train_settings(run_dir, **SETTINGS | changes)),
            clips=tiny.CLIPS,
            model=BaseModelConfig(path=str(base)),
            cache=cache,
        )

    return open_it


def test_its_losses_are_those_of_validation(student, run_dir):
    row = json.loads((run_dir / "validation.jsonl").read_text().splitlines()[-1])
    shown, keys = student(), held_out_clips(run_dir)
    assert shown.timesteps == (700,) and len(keys) == 2
    for timestep, wanted in zip(shown.timesteps, row["by_timestep"]["lgf"], strict=True):
        views = [shown.view(key, timestep) for key in keys]
        assert sum(view.loss for view in views) / 2 == pytest.approx(wanted, rel=1e-5)
        assert {view.step for view in views} == {1}


def test_its_flow_and_the_teachers_make_the_loss(student, tiny, cache):
    shown = student()
    key = tiny.KEYS[0]
    view = shown.view(key, 700)
    (size,) = open_cache(cache)
    config = TrainConfig(**tiny.train_settings("unused")).lgf
    layers = load_layers(size.readers, key, "00000", data=tiny.CLIPS, dataset=None, lgf=config)
    valid = torch.from_numpy(view.flow.valid_M)
    loss = gram_flow_loss(
        view.flow.by_direction["forward"][None],
        layers.flow.by_direction["forward"][None],
        temperature=config.temperature,
        divergence=config.divergence,
        valid_BP=(valid[:-1] & valid[1:])[None],
    )
    assert float(loss) == pytest.approx(view.loss, rel=1e-5)
    assert view.flow.moments == layers.flow.moments


def test_a_run_that_cannot_be_shown_says_why(student, tiny, tmp_path):
    with pytest.raises(ValueError, match="without the Local Gram Flow loss"):
        student(objectives=("repa",)).view(tiny.KEYS[0], 700)
    other = tiny.save_pipeline(tmp_path, transformer=tiny.tiny_transformer(num_layers=3))
    with pytest.raises(ValueError, match="is not the base model"):
        student(base=other).view(tiny.KEYS[0], 700)
