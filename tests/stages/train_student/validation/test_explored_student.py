"""The student that `explore` shows, against what the run's own validation measured."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

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
        assert {(view.step, view.weights) for view in views} == {(1, "last")}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_keeps_an_ema_shows_it(tiny, train, base_model, cache, tmp_path, method):
    settings = {"steps": 2, "method": method, "ema": {"decay": 0.9}}
    train(tmp_path / "run", **settings)
    shown = RunStudent(
        tmp_path / "run",
        config=TrainConfig(**tiny.train_settings(tmp_path / "run", **settings)),
        clips=tiny.CLIPS,
        model=BaseModelConfig(path=str(base_model)),
        cache=cache,
    )
    view = shown.view(tiny.KEYS[0], 500)
    assert (view.step, view.weights, math.isfinite(view.loss)) == (2, "average", True)
    (file,) = tmp_path.glob("run/checkpoints/*2/weight_average_rank_00000.safetensors")
    saved = load_file(file)
    weights = dict(shown._opened.student.named_parameters())
    assert {key.rpartition("@")[0] for key in saved} == {
        name for name, weight in weights.items() if weight.requires_grad
    }
    for key, piece in saved.items():
        name, _, start = key.rpartition("@")
        shown_piece = weights[name].detach().flatten()[int(start) : int(start) + len(piece)]
        torch.testing.assert_close(shown_piece, piece)


def test_a_student_that_continues_an_image_sees_its_first_frame(tiny, train, tmp_path, cache):
    transformer = tiny.tiny_transformer(in_channels=2 * tiny.LATENT[1])
    base = tiny.save_pipeline(tmp_path / "base", transformer=transformer)
    with_image = tiny.write_cache(tmp_path / "cache", image=True)
    train(tmp_path / "run", base=base, cache_root=with_image, **SETTINGS)

    def view(of_cache):
        student = RunStudent(
            tmp_path / "run",
            config=TrainConfig(**tiny.train_settings(tmp_path / "run", **SETTINGS)),
            clips=tiny.CLIPS,
            model=BaseModelConfig(path=str(base)),
            cache=of_cache,
        )
        return [student.view(key, 700).loss for key in held_out_clips(tmp_path / "run")]

    row = json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[-1])
    (wanted,) = row["by_timestep"]["lgf"]
    assert sum(view(with_image)) / 2 == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="image"):
        view(cache)


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
