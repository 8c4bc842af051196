"""`demo`: the order of its commands, what it evaluates, and its final output."""

import json

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands import evaluate, extract, inspect, train
from pipeline.console import CommandResult
from stages.sample_videos.requests import read_prompt_file


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def road(monkeypatch):
    """The commands that ran, with their arguments besides the configuration and the progress."""
    ran = []
    held_out = {"value": "0.1", "note": "0.2 before training"}
    answers = {
        extract: {},
        train: {"page": "r.html", "figures": {"a step": held_out, "held-out lgf loss": held_out}},
        evaluate: {"videos": {"lgf": ["v.mp4", "w.mp4"], "base": ["b.mp4"]}, "page": "e.html"},
        inspect: {"picture": "p.png"},
    }
    for module, data in answers.items():
        name = module.__name__.rpartition(".")[2]

        def run(config, progress, *options, name=name, data=data, **named):
            ran.append((name, *options, *named.items()))
            drawn = {"picture": "o.png"} if named else data
            return CommandResult(title=name, rows=[(name, "x")], data=drawn)

        monkeypatch.setattr(module, "run", run)
    return ran


def test_walks_the_road_and_ends_with_what_there_is_to_look_at(road):
    result = invoke("demo")
    assert result.exit_code == 0, result.stderr
    assert [name for name, *_ in road] == ["extract", "train", "evaluate", "inspect", "inspect"]
    assert road[-1] == ("inspect", ("overlay", True))
    assert result.stdout.splitlines()[-5:] == ["v.mp4", "e.html", "p.png", "o.png", "r.html"]
    assert "0.1 (0.2 before training)" in result.stdout
    assert "a step" not in result.stdout


def test_the_run_is_compared_with_its_base(road, tmp_path):
    assert invoke("demo", f"demo.root={tmp_path}").exit_code == 0
    (options,) = (given[0] for name, *given in road if name == "evaluate")
    assert (options.run, options.against) == (str(tmp_path / "runs" / "lgf"), "base")
    assert options.out == tmp_path / "evaluation"
    assert 6 <= len(read_prompt_file(options.prompt_file)) <= 8, "the demo takes minutes"


def test_image_to_video_takes_the_first_frames_of_held_out_clips(road):
    assert invoke("demo", "--config", "demo-i2v").exit_code == 0
    (options,) = (given[0] for name, *given in road if name == "evaluate")
    assert options.prompt_file is None


def test_json_is_one_object_with_every_step(road):
    answers = json.loads(invoke("demo", "--json").stdout)
    assert list(answers) == ["extract", "train", "evaluate", "inspect", "overlay"]


def test_stops_with_3_when_too_many_clips_were_skipped(road, monkeypatch):
    few = CommandResult(title="t", rows=[], data={}, exit_code=3)
    monkeypatch.setattr(extract, "run", lambda *_, **__: few)
    assert invoke("demo").exit_code == 3
    assert road == []


def test_needs_a_demo_section(road):
    result = invoke("demo", "--config", "cogvideox-5b-lora")
    assert result.exit_code == 2
    assert "use --config demo" in result.stderr
    assert road == []
