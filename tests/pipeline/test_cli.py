"""Arguments, exit codes and streams of the command line, with stages replaced by stubs."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache_schema.errors import StoreNotFound
from pipeline.cli import app
from pipeline.commands import estimate, extract, inspect, sample, train
from pipeline.console import CommandResult

DONE = CommandResult(title="done", rows=[("key", "value")], data={"key": "value"})
DEMO = ("--config", "demo")
WORKING = [
    (extract, ["extract-features", *DEMO]),
    (train, ["train", *DEMO]),
    (sample, ["sample", *DEMO, "--prompt", "a dog"]),
    (inspect, ["inspect", *DEMO]),
]


def invoke(*arguments, **options):
    return CliRunner().invoke(app, list(arguments), **options)


def stub(monkeypatch, module, outcome=DONE):
    """Replace a command's work; what it was asked for is returned as a list of calls."""
    calls = []

    def run(config, progress, *arguments, **options):
        calls.append((config, *arguments, options))
        print("chatter of a library")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(module, "run", run)
    return calls


@pytest.mark.parametrize("arguments", [["--help"], *([*a[:1], "--help"] for _, a in WORKING)])
def test_help_is_a_success(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


@pytest.mark.parametrize(("module", "arguments"), WORKING)
def test_a_command_gets_its_configuration_and_prints_its_answer(monkeypatch, module, arguments):
    calls = stub(monkeypatch, module)
    result = invoke(*arguments, "--config", "cogvideox-5b-lora", "train.steps=7")
    assert result.exit_code == 0, result.stderr
    ((config, *_),) = calls
    assert (config.name, config.train.steps) == ("cogvideox-5b-lora", 7)
    assert "key" in result.stdout
    assert "chatter" not in result.stdout
    assert "chatter" in result.stderr


@pytest.mark.parametrize(("module", "arguments"), WORKING)
def test_json_is_all_there_is_on_stdout(monkeypatch, module, arguments):
    stub(monkeypatch, module)
    assert json.loads(invoke(*arguments, "--json").stdout) == {"key": "value"}


class TestWithoutConfig:
    """Settings on the line decide; what they leave open is asked for."""

    @pytest.mark.parametrize(
        ("arguments", "missing"),
        [
            (["extract-features"], "set data.path=… and model.path=…"),
            (["extract-features", "data.path=clips"], "set model.path=…"),
            (["extract-features", "data.num_frames=9"], "set data.path=… and model.path=…"),
            (["train"], "set model.path=…"),
            (["sample", "--prompt", "a dog"], "set model.path=…"),
            (["config", "show"], "set data.path=… and model.path=…"),
        ],
    )
    def test_a_configuration_is_asked_for(self, monkeypatch, tmp_path, arguments, missing):
        monkeypatch.chdir(tmp_path)
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert "--config cogvideox-5b-lora" in result.stderr
        assert missing in result.stderr
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("module", "arguments"),
        [
            (extract, ["extract-features", "data.path=clips", "model.path=base"]),
            (train, ["train", "model.path=base"]),
            (sample, ["sample", "-p", "a dog", "model.path=base"]),
            (inspect, ["inspect"]),
        ],
    )
    def test_settings_on_the_line_are_enough(self, monkeypatch, module, arguments):
        calls = stub(monkeypatch, module)
        result = invoke(*arguments)
        assert result.exit_code == 0, result.stderr
        config = calls[0][0]
        assert config.demo is None
        assert (config.data.num_frames, config.train.steps) == (49, 2000)

    def test_a_wrong_value_is_told_beside_what_is_missing(self):
        result = invoke("extract-features", "extract.max_skipped=2", "model.path=base")
        assert result.exit_code == 2
        assert "extract.max_skipped must be <= 1, got 2" in result.stderr
        assert "data.path is missing" in result.stderr

    def test_sampling_takes_the_settings_of_the_run(self, monkeypatch, tmp_path):
        shown = invoke("config", "show", *DEMO, "train.steps=7")
        (tmp_path / "config.yaml").write_text(shown.stdout)
        calls = stub(monkeypatch, sample)
        result = invoke("sample", "-p", "a dog", "--run", str(tmp_path), "sample.seed=3")
        assert result.exit_code == 0, result.stderr
        config = calls[0][0]
        assert (config.name, config.train.steps, config.sample.seed) == ("demo", 7, 3)


@pytest.mark.parametrize(("module", "arguments"), WORKING)
def test_a_bad_setting_is_bad_usage_and_nothing_is_done(monkeypatch, module, arguments):
    calls = stub(monkeypatch, module)
    result = invoke(*arguments, "train.lerning_rate=1")
    assert result.exit_code == 2
    assert "did you mean train.optimizer.learning_rate?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
    assert not calls


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample"],
        ["sample", "--prompt", "x", "--image", "/nowhere.png"],
        ["sample", "--prompt", "x", "--run", "/nowhere"],
        ["train", "--stepps", "3"],
        ["no-such-command"],
        ["train", "--config", "no-such-preset"],
        ["inspect", "teacher", "no-equals-sign"],
    ],
)
def test_bad_usage_exits_with_2(arguments):
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "error",
    [
        ValueError("what, where and what to do"),
        StoreNotFound("what, where and what to do"),
        FileNotFoundError(2, "what, where and what to do", "file"),
        PermissionError("what, where and what to do"),
        type("TrainingDivergedError", (RuntimeError,), {})("what, where and what to do"),
        type("OutOfMemoryError", (RuntimeError,), {})("what, where and what to do"),
    ],
)
def test_an_expected_failure_is_one_message_and_exit_code_1(monkeypatch, error):
    stub(monkeypatch, train, error)
    result = invoke("train", *DEMO)
    assert result.exit_code == 1
    assert "what, where and what to do" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_running_out_of_memory_names_the_settings_that_help(monkeypatch):
    stub(monkeypatch, train, type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"))
    assert "train.micro_batch_size=1" in invoke("train", *DEMO).stderr


def test_notes_on_an_error_are_shown(monkeypatch):
    error = ValueError("broken")
    error.add_note("while extracting clip 'walk/1'")
    stub(monkeypatch, extract, error)
    assert "while extracting clip 'walk/1'" in invoke("extract-features", *DEMO).stderr


@pytest.mark.parametrize(
    ("arguments", "env"), [(["--traceback"], {}), ([], {"SAM2VX_TRACEBACK": "1"})]
)
def test_the_traceback_is_there_for_the_asking(monkeypatch, arguments, env):
    error = ValueError("boom")
    stub(monkeypatch, train, error)
    result = invoke("train", *DEMO, *arguments, env=env)
    assert result.exception is error
    assert result.exit_code == 1


def test_an_unexpected_failure_keeps_its_traceback(monkeypatch):
    error = AttributeError("a bug")
    stub(monkeypatch, train, error)
    assert invoke("train", *DEMO).exception is error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(1, "Operation not permitted", "a/b"), "a/b: Operation not permitted; "),
        (PermissionError(13, "Permission denied", b"a/b"), "a/b: Permission denied; "),
        (OSError(30, "Read-only file system", "a/b"), "a/b: Read-only file system; "),
        (OSError(28, "No space left on device"), "No space left on device; "),
        (OSError(28, "No space left on device", "a", None, "b"), "a -> b: No space left on "),
    ],
)
def test_what_the_system_refuses_is_a_sentence_with_path_and_remedy(monkeypatch, error, words):
    stub(monkeypatch, train, error)
    said = invoke("train", *DEMO).stderr
    assert f"\nerror: {words}" in said
    assert "Errno" not in said
    assert "outputs=…, train.run_dir=…" in said


def test_the_version_is_that_of_the_distribution():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout == f"sam2vx-pipeline {metadata.version('sam2videox')}\n"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("cogvideox-5b-lroa", "cogvideox-5b-lora"),
        ("CogVideoX_5B_LoRA", "cogvideox-5b-lora"),
        ("cogvideox-1.5-5b-lora", "cogvideox1.5-5b-lora"),
        ("2b-full", "cogvideox-2b-full"),
        ("mine.yml", "mine.yaml"),
        ("minne.yaml", "mine.yaml"),
    ],
)
def test_a_misspelt_configuration_suggests_the_nearest(monkeypatch, tmp_path, given, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: demo\n")
    result = invoke("train", "--config", given)
    assert result.exit_code == 2
    assert f"did you mean {meant}?" in result.stderr


@pytest.mark.parametrize("given", ["lora", "no-such-preset", "x", ".", ""])
def test_nothing_is_suggested_where_nothing_is_near(monkeypatch, tmp_path, given):
    monkeypatch.chdir(tmp_path)
    result = invoke("train", "--config", given)
    assert result.exit_code == 2
    assert "did you mean" not in result.stderr


@pytest.mark.parametrize(("module", "arguments"), WORKING)
def test_ctrl_c_exits_with_130(monkeypatch, module, arguments):
    stub(monkeypatch, module, KeyboardInterrupt())
    result = invoke(*arguments)
    assert result.exit_code == 130
    assert "stopped" in result.stderr
    resumable = module in (extract, train, sample)
    assert ("same command again" in result.stderr) is resumable


def test_too_many_skipped_clips_exit_with_3_after_the_table(monkeypatch):
    stub(monkeypatch, extract, CommandResult(title="t", rows=[("a", "b")], data={}, exit_code=3))
    result = invoke("extract-features", *DEMO)
    assert result.exit_code == 3
    assert "a" in result.stdout


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
@pytest.mark.parametrize("before", [True, False])
def test_the_launchers_option_is_accepted_before_and_after_the_command(monkeypatch, option, before):
    calls = stub(monkeypatch, train)
    arguments = [option, "train", *DEMO] if before else ["train", *DEMO, option]
    assert invoke(*arguments, "train.steps=2").exit_code == 0
    assert calls[0][0].train.steps == 2
    assert "local" not in invoke("train", "--help").stdout.lower()


def test_other_processes_than_the_first_print_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stub(monkeypatch, train)
    assert invoke("train", *DEMO).stdout == ""
    assert invoke("train", *DEMO, "--json").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "store", "steps"),
    [
        ([], None, 9),
        (["latents"], "latents", 9),
        (["latents", "train.steps=5"], "latents", 5),
        (["train.steps=5"], None, 5),
        (["some/cache/teacher-0"], "some/cache/teacher-0", 9),
    ],
)
def test_inspect_tells_a_store_from_a_setting(monkeypatch, arguments, store, steps):
    calls = stub(monkeypatch, inspect)
    result = invoke("inspect", *arguments, *([] if steps == 5 else ["train.steps=9"]))
    assert result.exit_code == 0, result.stderr
    ((config, options),) = calls
    assert (options["store"], config.train.steps) == (store, steps)


def test_inspect_passes_the_clip_and_the_folder_on(monkeypatch):
    calls = stub(monkeypatch, inspect)
    invoke("inspect", "--clip", "a=b/c", "--out", "pictures")
    assert calls[0][1] == {
        "store": None,
        "clip": "a=b/c",
        "every_clip": False,
        "overlay": False,
        "verbose": False,
        "out": Path("pictures"),
    }


@pytest.mark.parametrize(("arguments", "store"), [([], None), (["masks-0123"], "masks-0123")])
def test_inspect_passes_overlay_and_all_on(monkeypatch, arguments, store):
    calls = stub(monkeypatch, inspect)
    invoke("inspect", "--overlay", "--all", *arguments)
    options = calls[0][1]
    assert (options["store"], options["overlay"], options["every_clip"]) == (store, True, True)


def test_inspect_refuses_an_unknown_setting(monkeypatch):
    calls = stub(monkeypatch, inspect)
    assert invoke("inspect", "--overlay", "x=1").exit_code == 2
    assert not calls


class TestExtractFeatures:
    """The options that stand for settings, and the dry run."""

    @pytest.mark.parametrize(
        ("arguments", "kinds", "engine"),
        [
            ([], ("text", "latents", "teacher", "masks"), "local"),
            (["--kinds", "teacher,latents"], ("teacher", "latents"), "local"),
            (["--kinds", "masks", "extract.kinds=[text]"], ("masks",), "local"),
            (["--engine", "ray"], ("text", "latents", "teacher", "masks"), "ray"),
        ],
    )
    def test_kinds_and_engine_are_settings(self, monkeypatch, arguments, kinds, engine):
        calls = stub(monkeypatch, extract)
        result = invoke("extract-features", *DEMO, *arguments)
        assert result.exit_code == 0, result.stderr
        ((config, options),) = calls
        assert (config.extract.kinds, config.extract.engine) == (kinds, engine)
        assert options == {"retry_failed": False, "refresh_changed": False}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--kinds", "teacher,feature"], "extract.kinds"),
            (["--kinds", ""], "extract.kinds"),
            (["--kinds", "a]"], "extract.kinds"),
            (["--engine", "slurm"], "extract.engine"),
        ],
    )
    def test_what_they_do_not_know_is_bad_usage(self, monkeypatch, arguments, message):
        calls = stub(monkeypatch, extract) + stub(monkeypatch, estimate)
        result = invoke("extract-features", *DEMO, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not calls

    @pytest.mark.parametrize("option", ["--retry-failed", "--refresh-changed"])
    @pytest.mark.parametrize("dry", [[], ["--dry-run"]])
    def test_clips_are_made_again_when_asked_for(self, monkeypatch, option, dry):
        calls = stub(monkeypatch, estimate if dry else extract)
        invoke("extract-features", *DEMO, option, *dry)
        named = {"--retry-failed": "retry_failed", "--refresh-changed": "refresh_changed"}
        assert calls[0][1] == {name: given == option for given, name in named.items()}

    def test_a_dry_run_estimates_and_extracts_nothing(self, monkeypatch):
        extracted, estimated = stub(monkeypatch, extract), stub(monkeypatch, estimate)
        result = invoke("extract-features", *DEMO, "--dry-run", "--kinds", "text", "--json")
        assert json.loads(result.stdout) == {"key": "value"}
        assert estimated[0][0].extract.kinds == ("text",)
        assert not extracted


def test_all_clips_or_one_but_not_both(monkeypatch):
    calls = stub(monkeypatch, inspect)
    assert invoke("inspect", "--all", "--clip", "walk/1").exit_code == 2
    assert not calls
