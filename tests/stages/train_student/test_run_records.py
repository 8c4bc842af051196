"""A run's own records of any content are refused with their path."""

import json

import pytest

from stages.sample_videos.runs import find_export
from stages.train_student.checkpoints.export import export_checkpoint
from stages.train_student.run_folder import finished_steps, held_out_before, open_run

WHOLE = {"settings": {"a": 1}, "clip_digests": {}, "held_out": ["b"]}
CHANGES = [
    {"settings": 10**30},
    {"settings": None},
    {"clip_digests": []},
    {"held_out": 2},
    {"held_out": [["b"]]},
    {"held_out": [10**30]},
]


def open_again(run_dir):
    return open_run(run_dir, {"a": 1}, {}, {}, clips={}, held_out=["b"], leave_out=None)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_damaged_run_record_is_named(tmp_path, change):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(WHOLE))
    assert held_out_before(tmp_path, 1) == ("b",)
    assert open_again(tmp_path) is None
    file.write_text(json.dumps(WHOLE | change))
    for read in (open_again, lambda folder: held_out_before(folder, 1)):
        with pytest.raises(ValueError, match=rf"run\.json is damaged: {next(iter(change))}"):
            read(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"settings": [1]}', "[" * 10**4, '{"settings": NaN}']
)
def test_an_export_names_the_damaged_record(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        export_checkpoint(tmp_path, None, None)


@pytest.mark.parametrize("steps", [10**30, -1, 1.5, float("inf"), "3", None, [1], True])
def test_steps_that_are_no_number_of_steps(tmp_path, steps):
    (tmp_path / "finished.json").write_text(json.dumps({"steps": steps}))
    with pytest.raises(ValueError, match=r"finished\.json is damaged: steps is"):
        finished_steps(tmp_path)


@pytest.mark.parametrize("files", [None, 3, [], {"a": 3}, {"a": {"bytes": 1.5, "crc32c": "0"}}])
def test_a_damaged_record_of_an_export_is_named(tmp_path, files):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "export.json").write_text(json.dumps({"files": files}))
    with pytest.raises(ValueError, match=r"export\.json"):
        find_export(tmp_path)
