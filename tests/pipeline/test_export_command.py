"""`export`: arguments passed to the stage, and output."""

import json
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from stages.train_student.checkpoints.export import ExportSummary


@pytest.fixture
def calls(monkeypatch):
    """Stand in for the stage; it answers as if the run kept an average of adapters."""
    made = []

    def export_checkpoint(run_dir, step, out, *, which, form):
        made.append((run_dir, step, out, which, form))
        return ExportSummary(
            folder=out or run_dir / "export",
            method="lora",
            step=500 if step in (None, "best") else step,
            weights=which or "average",
            form=form,
            transformer="WanTransformer3DModel",
            parameters=1_234_567,
        )

    module = types.SimpleNamespace(export_checkpoint=export_checkpoint)
    monkeypatch.setitem(sys.modules, "stages.train_student.checkpoints.export", module)
    return made


def call(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_the_newest_checkpoint_and_its_average_are_the_default(calls, tmp_path):
    done = call("--run", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    assert calls == [(tmp_path, None, None, None, "diffusers")]
    answer = json.loads(done.stdout)
    assert answer.pop("seconds") >= 0
    assert answer == {
        "export": str(tmp_path / "export"),
        "run": str(tmp_path),
        "method": "lora",
        "step": 500,
        "weights": "average",
        "format": "diffusers",
        "transformer": "WanTransformer3DModel",
        "parameters": 1_234_567,
        "expert": None,
    }


def test_step_weights_and_folder_are_passed_on(calls, tmp_path):
    out = tmp_path / "out"
    done = call("--run", tmp_path, "--checkpoint", 20, "--weights", "last", "--out", out)
    assert done.exit_code == 0, done.output
    assert calls == [(tmp_path, 20, out, "last", "diffusers")]
    assert "1,234,567 parameters" in done.stdout
    assert "load_lora_weights" in done.stdout


@pytest.mark.parametrize(
    ("form", "reader"), [("comfyui", "in ComfyUI"), ("kohya", "in VideoX-Fun")]
)
def test_another_form_names_the_program_that_reads_it(calls, tmp_path, form, reader):
    done = call("--run", tmp_path, "--format", form)
    assert done.exit_code == 0, done.output
    assert calls[0][-1] == form
    assert reader in done.stdout
    assert "sam2vx-pipeline sample" not in done.stdout


def test_the_best_checkpoint_is_passed_on_by_name(calls, tmp_path):
    assert call("--run", tmp_path, "--checkpoint", "best").exit_code == 0
    assert calls[0][1] == "best"
    done = call("--run", tmp_path, "--checkpoint", "newest")
    assert done.exit_code == 2
    assert "must be a step or best" in done.output
    assert len(calls) == 1


def test_weights_of_another_name_are_bad_usage(calls, tmp_path):
    assert call("--run", tmp_path, "--weights", "best").exit_code == 2
    assert not calls


def test_a_folder_without_a_run_fails_in_one_line(tmp_path):
    done = CliRunner().invoke(app, ["export", "--run", str(tmp_path)])
    assert done.exit_code == 1
    assert f"there is no run at {Path(tmp_path)}" in done.stderr
    assert "Traceback" not in done.stderr
