"""A run's records of any content: the page is made, or an error names the file."""

import copy
import json
import os

import pytest
from ruamel.yaml import YAML

from stages.train_student.report.report import write_report
from tests.stages.train_student.report.conftest import CONFIG, losses, performance, validation


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"more": [value]}
    return value


STRANGE = [
    10**30,
    -(10**30),
    2**63,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    1e308,
    None,
    True,
    "text",
    "\ud800",
    [],
    {},
    [[1]],
    {"a": [1]},
    nested(40),
    nested(400),
]
SKIPPED = {
    "step": 3,
    "what": "loss",
    "clips": [{"key": "a", "timestep": 9, "diffusion": "nan", "auxiliary": {"lgf": 2.0}}],
}
DAMAGED = {"step": 4, "key": "b", "message": "torn", "gone": False}
SAMPLES = {
    "step": 5,
    "prompts": ["a dog"],
    "denoising_steps": 5,
    "guidance": 6.0,
    "seed": 0,
    "scores": [{"contrast": 0.2, "flicker": None}],
}
RECORDS = {
    "run.json": {"settings": {"a": 1}, "provenance": {"command": "x"}, "processes": 2},
    "losses.jsonl": losses(1)[0],
    "performance.jsonl": performance(1)[0],
    "validation.jsonl": validation(1),
    "skipped_steps.jsonl": SKIPPED,
    "damaged_clips.jsonl": DAMAGED,
    "samples/step-000005/samples.json": SAMPLES,
    "config.yaml": YAML(typ="safe").load(CONFIG),
}


def paths(value, path=()):
    """Where the parts of a record lie, the whole of it first; of lists the first element."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from paths(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from paths(value[0], (*path, 0))


def put(record, path, value):
    if not path:
        return value
    record = copy.deepcopy(record)
    place = record
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return record


def without(record, path):
    record = copy.deepcopy(record)
    place = record
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return record


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_any_content_are_shown_or_refused_by_name(make_run, draw, name, monkeypatch):
    # The drawing of curves takes the most time, and is handed checked numbers alone.
    monkeypatch.setattr("stages.train_student.report.page.as_svg", lambda picture: b"")
    folder = make_run(4, skipped_steps=[SKIPPED], damaged_clips=[DAMAGED])
    draw(folder, 5, ["a dog"])
    file, record = folder / name, RECORDS[name]
    file.write_text(json.dumps(record) + "\n")
    write_report(folder)
    for path in paths(record):
        changed = [put(record, path, value) for value in STRANGE]
        for one in (*changed, *([without(record, path)] if path else [])):
            file.write_text(json.dumps(one) + "\n")
            try:
                write_report(folder)
            except ValueError as error:
                assert str(file) in str(error), (path, one)


@pytest.mark.parametrize("name", RECORDS)
def test_sparse_and_bottomless_records_are_refused(make_run, draw, name):
    folder = make_run(4)
    draw(folder, 5, ["a dog"])
    file = folder / name
    file.touch()
    os.truncate(file, 20 << 30)
    with pytest.raises(ValueError, match=file.name):
        write_report(folder)
    file.write_text("[" * 10**4 + "\n")
    with pytest.raises(ValueError, match=file.name):
        write_report(folder)
