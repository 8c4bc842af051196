"""Output of `train --dry-run`, from configuration files alone."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from stages.students.cogvideox.official_models import FOLDER as OFFICIAL_FOLDER

OFFICIAL = (
    "cogvideox-2b-full",
    "cogvideox-5b-lora",
    "cogvideox-5b-i2v-lora",
    "cogvideox1.5-5b-lora",
    "cogvideox1.5-5b-i2v-lora",
)

SMALL = ("data.num_frames=9", "data.height=64", "data.width=96")


@pytest.fixture(autouse=True)
def _no_model_is_here(no_hub):
    """Official models are known all the same."""


def dry_run(*words, preset="cogvideox-2b-lora", size=SMALL):
    arguments = ["train", "--dry-run", "--config", preset, *size, *words]
    found = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    return found.exit_code, found.stdout, found.exception


def test_it_fits_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, told, _ = dry_run("--gpu", "h100", "--gpus", "8")
    assert code == 0
    for words in ("1.69B parameters", "memory per GPU", "NVIDIA H100", "8 GPUs x 4 passes"):
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


def test_a_teacher_from_the_image_encoder_is_as_wide_as_from_memory_attention():
    heads = []
    for features in ("memory_attention", "image_encoder", "memory_encoder"):
        words = ("train.objectives=[repa]", f"extract.teacher.features={features}")
        heads.append(json.loads(dry_run("--json", *words)[1])["parameters"]["heads"])
    assert heads[0] == heads[1] > heads[2]


def test_a_teacher_on_its_own_grid_has_the_tokens_of_its_tracker(tmp_path, monkeypatch):
    """As in the table of docs/trackers.md; of a tracker in transformers, config.json is read."""
    planned = []

    def estimate(config, configs, stores, **_):
        planned.extend(stores)
        raise ValueError("seen enough")

    monkeypatch.setattr("stages.dry_run.train.estimate", estimate)
    (tmp_path / "config.json").write_text('{"model_type": "sam3_tracker_video"}')
    for checkpoint, size in (("facebook/sam2.1-hiera-large", 1024), (tmp_path, 1008)):
        teacher = {"checkpoint": checkpoint, "image_size": size, "grid": "native"}
        dry_run(*(f"extract.teacher.{name}={value}" for name, value in teacher.items()))
    sam2, sam3 = (stores.teacher.arrays["features"].shape for stores in planned)
    assert (sam2, sam3) == ((9, 64, 64, 512), (9, 72, 72, 512))


def test_the_best_checkpoint_takes_room_too_and_a_wrong_curve_is_refused():
    words = ("train.validation.clips=2", "train.checkpoint_every=250")
    assert "for the 3 that are kept" in dry_run(*words)[1]
    assert "for the 4 that are kept" in dry_run(*words, "train.keep_best=validation/lgf")[1]
    code, _, problem = dry_run("--traceback", *words, "train.keep_best=validation/repa")
    assert code != 0
    assert "train.keep_best is validation/repa" in str(problem)


def test_options_of_the_dry_run_need_it():
    found = CliRunner().invoke(app, ["train", "--gpus", "2"])
    assert found.exit_code == 2


def test_an_unknown_gpu_is_refused_with_those_that_are_known():
    words = ["train", "--dry-run", "--config", "cogvideox-2b-lora", "--gpu", "h1"]
    found = CliRunner().invoke(app, [*words, "--traceback"])
    assert found.exit_code != 0
    assert "unknown GPU 'h1'; known GPUs are b200" in str(found.exception)


@pytest.mark.parametrize(
    "preset",
    [OFFICIAL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in OFFICIAL[1:])],
)
def test_official_models_are_known_without_a_network(preset):
    # CogVideoX-5B-I2V's learned positions are of one size.
    size = () if preset == "cogvideox-5b-i2v-lora" else SMALL
    code, told, _ = dry_run("--gpu", "rtx4090", preset=preset, size=size)
    assert code in (0, 1), "fits or not"
    assert "NVIDIA GeForce RTX 4090" in told
    assert "a copy of its configuration is used" in told


def test_a_damaged_model_is_refused_before_anything_is_estimated(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(OFFICIAL_FOLDER / "cogvideox-2b", folder)
    words = ("--gpu", "h100", "--traceback", f"model.path={folder}")
    arguments = ["train", "--dry-run", "--config", "cogvideox-2b-lora", *SMALL, *words]
    found = CliRunner().invoke(app, arguments)
    assert f"{folder}/transformer has no diffusion_pytorch_model" in str(found.exception)
