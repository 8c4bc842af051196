"""What `train --dry-run` prints: of configuration files alone, without a cache or a weight."""

import json
from pathlib import Path

from typer.testing import CliRunner

from pipeline.cli import app

CONFIGS = Path(__file__).parents[1] / "official_configs"
SMALL = ("data.num_frames=9", "data.height=64", "data.width=96")


def dry_run(*words, model="cogvideox-2b", preset="cogvideox-2b-lora"):
    arguments = ["train", "--dry-run", "--config", preset, f"model.path={CONFIGS / model}"]
    found = CliRunner().invoke(app, [*arguments, *SMALL, *words], env={"COLUMNS": "200"})
    return found.exit_code, found.stdout, found.exception


def test_it_fits_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, told, _ = dry_run("--gpu", "h100", "--gpus", "8")
    assert code == 0
    for words in ("1.69B parameters", "memory of each GPU", "NVIDIA H100", "8 GPUs x 4 passes"):
        assert words in told
    assert "assumed" in told
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_fit_fails_and_says_what_would():
    code, told, _ = dry_run(
        "--gpu", "rtx-3090", "--gpus", "1", "--json", "train.method=full", "train.objectives=[]"
    )
    found = json.loads(told)
    assert code == 1
    assert found["fits"] is False
    assert found["gpu_bytes"] > found["gpu_memory_bytes"] > found["remedy"]["gpu_bytes"]
    assert found["remedy"]["settings"]
    assert found["memory"]["gpu"]["weights"] == 2 * found["parameters"]["total"]


def test_what_the_planned_store_does_not_hold_is_refused_as_training_would():
    for words, told in (
        (("train.teacher_form=gram_flow", "train.lgf.pairs=crossed"), "gram_flow.pairs=crossed"),
        (("extract.teacher.fusion=average", "train.lgf.directions=forward"), "fused in Gram-flow"),
    ):
        code, _, problem = dry_run("--traceback", *words)
        assert code != 0
        assert told in str(problem)
    pairs = ("extract.gram_flow.pairs=crossed", "train.lgf.pairs=crossed")
    for form in ("features", "gram_flow"):
        assert dry_run(f"train.teacher_form={form}", *pairs)[0] == 0


def test_options_of_the_dry_run_need_it():
    found = CliRunner().invoke(app, ["train", "--gpus", "2"])
    assert found.exit_code == 2


def test_an_unknown_gpu_is_refused_with_those_that_are_known():
    model = f"model.path={CONFIGS / 'cogvideox-2b'}"
    words = ["train", "--dry-run", "--config", "cogvideox-2b-lora", model, "--gpu", "h1"]
    found = CliRunner().invoke(app, [*words, "--traceback"])
    assert found.exit_code != 0
    assert "no GPU is named 'h1'; there are b200" in str(found.exception)
