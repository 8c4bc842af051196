"""The probe from a cache to its results: which block wins, resuming, and what is refused."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from cache_schema import CorruptClip
from stages.config import BaseModelConfig
from stages.probe_blocks.config import ProbeConfig
from stages.probe_blocks.probe import probe_blocks
from stages.progress import SilentProgress
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import CachedSamples
from tests.stages.train_student import conftest as tiny

SETTINGS = {"clips": 3, "held_out": 2, "timesteps": (900, 100), "fit_steps": 4}
TRAIN = {
    "lgf": {"radius": 1, "projector_widths": (16, 8, 8)},
    "deepspeed": {"precision": "fp32"},
    "seed": 5,
}


@pytest.fixture(scope="module", autouse=True)
def no_picture():
    """A picture takes a third of a second; test_results.py draws it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.probe_blocks.probe.draw_heat_map", lambda results: b"picture")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Results of a text-to-video model; `made.run` probes again."""
    return make_probe(tmp_path_factory.mktemp("text"), image=False)


@pytest.fixture(scope="module")
def made_of_image(tmp_path_factory):
    """The same of an image-to-video model."""
    return make_probe(tmp_path_factory.mktemp("image"), image=True)


def make_probe(folder, *, image):
    transformer = tiny.tiny_transformer(in_channels=tiny.LATENT[1] * (1 + image))
    base = tiny.save_pipeline(folder / "base", transformer=transformer)
    cache = tiny.write_cache(folder / "cache", image=image)

    def run(out, *, progress=None, train=TRAIN, **changes):
        return probe_blocks(
            ProbeConfig(**SETTINGS | changes),
            TrainConfig(**train),
            tiny.CLIPS,
            BaseModelConfig(path=str(base)),
            cache,
            out,
            provenance={"made by": "a test"},
            progress=progress or SilentProgress(),
        )

    whole = folder / "whole"
    return SimpleNamespace(run=run, whole=whole, results=run(whole))


def blocks_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("block-*.json")}


@pytest.mark.parametrize("name", ["made", "made_of_image"])
def test_every_block_is_measured_on_the_held_out_clips_at_every_timestep(name, request):
    probed = request.getfixturevalue(name)
    results = probed.results
    assert [block.block for block in results.blocks] == [0, 1]
    assert len(results.uniform) == 2 and results.fitted_on == 3
    for block in results.blocks:
        assert block.losses.keys() == results.uniform.keys()
        assert results.losses_KS(block).shape == (2, 2)
        assert np.isfinite(results.losses_KS(block)).all()
    assert {path.name for path in probed.whole.iterdir()} == {
        *("settings.json", "summary.json", "scores.csv", "heat_map.png"),
        *("block-00.json", "block-01.json"),
    }


class StopAt(SilentProgress):
    """Stops the probe when it says `note`, as Ctrl-C does."""

    def __init__(self, note):
        self._note = note

    @contextmanager
    def task(self, *args, **kwargs):
        with SilentProgress().task(*args, **kwargs) as task:
            yield SimpleNamespace(advance=task.advance, note=self.stop)

    def stop(self, text):
        if text == self._note:
            raise KeyboardInterrupt


def test_a_stopped_probe_resumes_with_the_same_numbers(made, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        made.run(tmp_path, progress=StopAt("block 1, fitting"))
    assert blocks_in(tmp_path).keys() == {"block-00.json"}
    again = made.run(tmp_path)
    assert blocks_in(tmp_path) == blocks_in(made.whole)
    assert again == made.results
    for name in ("summary.json", "scores.csv"):
        assert (tmp_path / name).read_bytes() == (made.whole / name).read_bytes()


def test_blocks_can_be_added_and_a_finished_probe_loads_no_model(made, tmp_path, monkeypatch):
    assert [block.block for block in made.run(tmp_path, blocks=(1,)).blocks] == [1]
    assert made.run(tmp_path) == made.results
    monkeypatch.setattr("stages.probe_blocks.probe.BlockwiseTransformer", None)
    assert made.run(tmp_path, blocks=(0,)) == made.results


@pytest.mark.parametrize(
    ("settings", "train", "named"),
    [
        ({"fit_steps": 5}, {}, "probe.fit_steps was 4, is 5"),
        ({"clips": 2}, {}, "fitted_on"),
        ({}, {"seed": 6}, "train.seed was 5, is 6"),
    ],
)
def test_other_settings_are_refused_in_the_same_folder(made, settings, train, named):
    before = blocks_in(made.whole)
    with pytest.raises(ValueError, match="different settings") as error:
        made.run(made.whole, train=TRAIN | train, **settings)
    assert named in str(error.value) and "--out" in str(error.value)
    assert blocks_in(made.whole) == before


@pytest.mark.parametrize(
    ("settings", "lgf", "message"),
    [
        ({"blocks": (2,)}, {}, "probe.blocks must be of 0 to 1"),
        ({"blocks": (1, 1)}, {}, "without repeats"),
        ({"timesteps": ()}, {}, "probe.timesteps must be one or more"),
        ({"timesteps": (5, 5)}, {}, "without repeats"),
        ({"timesteps": (1000,)}, {}, "0 to 999"),
        ({"timesteps": (700,)}, {"timesteps": (0, 500)}, "0 to 500, where train.lgf.timesteps"),
        ({"clips": 4}, {}, "need 6 clips, but 5"),
        ({}, {"divergence": "l2"}, "train.lgf.divergence=kl"),
    ],
)
def test_bad_settings_stop_before_any_work(made, tmp_path, settings, lgf, message):
    with pytest.raises(ValueError, match=message):
        made.run(tmp_path / "out", train=TRAIN | {"lgf": TRAIN["lgf"] | lgf}, **settings)
    assert not (tmp_path / "out").exists()


def test_clips_that_cannot_be_used_are_left_out_and_listed(made, tmp_path, monkeypatch):
    """One is damaged, another shows its subject in no frame; none counts as a loss of 0."""
    damaged, unseen = next(iter(made.results.uniform)), None
    read = CachedSamples.fixed_batches

    def fixed_batches(self, key, timesteps):
        nonlocal unseen
        if key == damaged:
            raise CorruptClip("a checksum does not match", remedy="repair", subject="teacher")
        batches = read(self, key, timesteps)
        if key not in made.results.uniform and unseen in (None, key):
            unseen = key
            for batch in batches:
                batch.teacher_valid_BT.zero_()
        return batches

    monkeypatch.setattr(CachedSamples, "fixed_batches", fixed_batches)
    results = made.run(tmp_path)
    assert results.excluded.keys() == {damaged, unseen}
    assert "checksum" in results.excluded[damaged]
    assert damaged not in results.uniform and results.fitted_on == 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["excluded"] == results.excluded


@pytest.mark.parametrize(("loss", "message"), [(0.0, "uniform on every"), (np.nan, "is NaN")])
def test_a_teacher_that_says_nothing_is_refused(made, tmp_path, monkeypatch, loss, message):
    monkeypatch.setattr(
        "stages.probe_blocks.fit.LinearProbe.uniform_loss", lambda self, batch: loss
    )
    with pytest.raises(ValueError, match=message):
        made.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
