import sys
import types
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from tests.pipeline.cache_stores import write_store


@pytest.fixture
def minimal(tmp_path):
    """A configuration file with nothing but what has no default."""
    path = tmp_path / "minimal.yaml"
    path.write_text("name: minimal\ndata: {path: clips}\nmodel: {path: base}\n")
    return str(path)


@pytest.fixture
def cache(tmp_path):
    """Two shards, three clips, of two kinds."""
    folder = tmp_path / "cache"
    shards = {"00000": ["walk/0", "walk/1"], "00001": ["run/0"]}
    write_store(folder, "teacher", shards, skipped=["walk/9"])
    write_store(folder, "text", shards)
    return folder


@pytest.fixture
def config(minimal, tmp_path):
    """The configuration of tiny clips, with every folder below `tmp_path`."""
    return load_config(
        minimal,
        [
            f"cache={tmp_path}/cache",
            f"outputs={tmp_path}/outputs",
            f"train.run_dir={tmp_path}/runs/one",
            "data.num_frames=9",
            "data.height=32",
            "data.width=48",
        ],
    )


@pytest.fixture
def replace_stage(monkeypatch):
    """Returns a function that stands in for a stage's module without loading it."""

    def replace(module, **functions):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))

    return replace


@pytest.fixture
def fake_models(monkeypatch):
    """Replaces the opening of video models: none is read, and names tell the weights."""
    from stages.sample_videos import sample

    def open_video_model(config, model, clips, *, run_dir):
        return sample.VideoModel(
            name="base" if run_dir is None else run_dir.name,
            base=Path(model.path),
            run_dir=run_dir,
            exports={},
            config=config,
            size=config.video_size(clips),
            fps=8.0,
            settings={"weights": str(run_dir), "steps": config.steps},
        )

    monkeypatch.setattr(sample, "open_video_model", open_video_model)
    monkeypatch.setattr(sample, "check_images", lambda model, requests: None)
