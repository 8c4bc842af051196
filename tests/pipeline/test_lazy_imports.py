"""Modules that each command imports, checked in separate processes."""

import os
import subprocess
import sys

import pytest

HEAVY = ["torch", "diffusers", "transformers", "deepspeed", "sam2", "zarr", "webdataset"]
CONFIG_SHOW = ("config", "show", "--config", "demo")


def modules_after(script):
    code = f"{script}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    return set(done.stdout.splitlines())


def command(*words):
    return (
        "import contextlib, io\n"
        "from pipeline.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    app({list(words)!r})"
    )


@pytest.mark.parametrize(
    "words", [("--help",), ("train", "--help"), ("cache", "drop", "--help"), CONFIG_SHOW]
)
def test_help_and_configuration_load_no_library_that_computes(words):
    assert modules_after(command(*words)).isdisjoint(HEAVY)


def test_training_sampling_and_inspecting_load_nothing_of_the_tracker():
    loaded = modules_after(
        "import pipeline.cli, pipeline.commands.train, pipeline.commands.sample\n"
        "import pipeline.commands.inspect, stages.train_student.train\n"
        "import stages.sample_videos.sample, stages.inspect_cache.draw_store\n"
        "import pipeline.commands.explore, stages.explore.server"
    )
    assert "sam2" not in loaded
    stage_one = {name for name in loaded if name.startswith("stages.extract_features.")}
    assert stage_one <= {"stages.extract_features.config"}


def test_looking_after_stores_loads_nothing_that_computes():
    names = ("listing", "verify", "repair", "drop", "merge", "copying")
    modules = ", ".join(f"pipeline.commands.maintenance.{name}" for name in names)
    loaded = modules_after(f"import pipeline.cli, {modules}")
    assert loaded.isdisjoint({"torch", "diffusers", "transformers", "deepspeed", "sam2"})
