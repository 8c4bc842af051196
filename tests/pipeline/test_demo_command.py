"""`demo`: the order of its commands, and its final output."""

import json

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands import demo, extract, inspect, sample, train
from pipeline.console import CommandResult


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def road(monkeypatch):
    """The commands that ran."""
    order = []
    for name, module in (("extract", extract), ("train", train), ("sample", sample)):
        held_out = {"value": "0.1", "note": "0.2 before training"}
        figures = {"a step": held_out, "held-out lgf loss": held_out}
        data = {"videos": [{"video": "v.mp4"}], "page": "r.html", "figures": figures}
        answer = CommandResult(title=name, rows=[(name, "x")], data=data)
        monkeypatch.setattr(
            module, "run", lambda *_, a=answer, n=name, **__: (order.append(n), a)[1]
        )
    drawn = CommandResult(title="inspect", rows=[], data={"picture": "p.png"})
    monkeypatch.setattr(inspect, "run", lambda *_, **__: (order.append("inspect"), drawn)[1])
    monkeypatch.setattr(demo, "_first_caption", lambda _: "a person walks")
    return order


def test_walks_the_road_and_ends_with_what_there_is_to_look_at(road):
    result = invoke("demo")
    assert result.exit_code == 0, result.stderr
    assert road == ["extract", "train", "sample", "inspect"]
    assert result.stdout.splitlines()[-3:] == ["v.mp4", "p.png", "r.html"]
    assert "0.1 (0.2 before training)" in result.stdout
    assert "a step" not in result.stdout


def test_json_is_one_object_with_every_step(road):
    answers = json.loads(invoke("demo", "--json").stdout)
    assert list(answers) == ["extract", "train", "sample", "inspect"]


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
