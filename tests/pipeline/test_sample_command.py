"""`sample`: which prompts, which run, and files that replace nothing unasked."""

import json
import sys
import types
from pathlib import Path

import pytest

from pipeline.commands import sample
from pipeline.commands.sample import claim_named_file, claim_new_file, file_stem
from pipeline.config.load import ConfigError, load_config
from stages.progress import SilentProgress
from stages.sample_videos.sample import SampleSummary

QUIET = SilentProgress()
ALIKE = "a red fox runs through deep snow towards the camera, slowly, in the evening light"


@pytest.fixture
def config(minimal, tmp_path):
    return load_config(
        minimal, [f"outputs={tmp_path}/outputs", f"train.run_dir={tmp_path}/runs/one"]
    )


class Stage:
    """Stands in for the drawing: each video holds its prompt."""

    def __init__(self):
        self.calls = []
        self.wants_image = False
        self.fails = False

    def image_mismatch(self, model, image):
        return "it needs an image" if self.wants_image and image is None else None

    def sample_videos(self, *sections, prompts, outs, run_dir, **options):
        self.calls.append({"prompts": prompts, "outs": outs, "run_dir": run_dir, **options})
        for prompt, out in zip(prompts, outs, strict=True):
            if self.fails:
                raise ValueError("out of luck")
            out.write_text(prompt)
            yield SampleSummary(
                out=out,
                prompt=prompt,
                run_dir=run_dir,
                weights="base" if run_dir is None else "lora",
                num_frames=9,
                height=32,
                width=48,
                fps=8.0,
                seconds=1.0,
            )


@pytest.fixture
def stage(monkeypatch):
    stage = Stage()
    module = types.SimpleNamespace(
        sample_videos=stage.sample_videos, image_mismatch=stage.image_mismatch
    )
    monkeypatch.setitem(sys.modules, "stages.sample_videos.sample", module)
    return stage


def finish(config, name="one"):
    run = config.train.run_dir.parent / name
    run.mkdir(parents=True)
    (run / "finished.json").touch()
    (run / "config.yaml").write_text(f"model: {{path: {config.model.path}}}\n")
    return run


def draw(config, *prompts, **options):
    return sample.run(config, QUIET, prompts=prompts, base_only=True, **options)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_newest_finished_run_is_the_default(config, stage):
    run = finish(config)
    answer = sample.run(config, QUIET, prompts=["A dog, [running]!"])
    (call,) = stage.calls
    assert call["run_dir"] == run
    assert call["outs"] == [config.outputs / "one-a-dog-running-seed0.mp4"]
    assert answer.notes == [str(call["outs"][0])]


def test_beside_the_video_lies_how_it_was_made(config, stage, tmp_path):
    finish(config)
    sample.run(config, QUIET, prompts=["a dog"], out=tmp_path / "dog.mp4")
    told = json.loads((tmp_path / "dog.json").read_text())
    assert told["prompt"] == "a dog"
    assert told["sample"]["seed"] == 0
    assert told["made_with"]["python"]


def test_without_a_finished_run_the_remedies_are_named(config, stage):
    with pytest.raises(ValueError, match=r"no finished run of base in .*--base"):
        sample.run(config, QUIET, prompts=["a dog"])
    assert not stage.calls


@pytest.mark.parametrize(
    ("wants_image", "options", "message"),
    [
        (True, {}, "it needs an image"),
        (False, {"out": Path("dog.avi")}, r"must end in \.mp4"),
        (False, {"overwrite": True}, "--overwrite needs --out"),
        (False, {"run_dir": Path("run"), "base_only": True}, "remove --run"),
        (False, {"prompts": ["a", "b"], "out": Path("x.mp4")}, "there are 2 prompts"),
    ],
)
def test_what_does_not_go_together_is_bad_usage(config, stage, wants_image, options, message):
    finish(config)
    stage.wants_image = wants_image
    with pytest.raises(ConfigError, match=message):
        sample.run(config, QUIET, **{"prompts": ["a dog"]} | options)
    assert not stage.calls


class TestPrompts:
    """`-p` may be given several times, and `@file` stands for lines."""

    def test_each_is_drawn_with_models_that_are_loaded_once(self, config, stage):
        answer = draw(config, "a dog", "a cat")
        (call,) = stage.calls
        assert [out.read_text() for out in call["outs"]] == ["a dog", "a cat"]
        assert answer.notes == [str(out) for out in call["outs"]]
        assert [one["prompt"] for one in answer.data["videos"]] == ["a dog", "a cat"]

    def test_the_lines_of_a_file(self, config, stage, tmp_path):
        listed = tmp_path / "prompts.txt"
        listed.write_text("a dog\n\n  un chien été\r\n", encoding="utf-8")
        draw(config, f"@{listed}", "a cat")
        assert stage.calls[0]["prompts"] == ["a dog", "un chien été", "a cat"]

    def test_a_file_given_as_words_is_refused_with_the_hint(self, config, stage, tmp_path):
        (tmp_path / "prompts.txt").write_text("a dog\n")
        with pytest.raises(ConfigError, match=r"is a file; --prompt @.*prompts\.txt samples"):
            draw(config, str(tmp_path / "prompts.txt"))
        assert not stage.calls

    def test_a_prompt_longer_than_any_path_is_a_prompt(self, config, stage):
        draw(config, "word " * 2000)
        assert len(stage.calls) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "No such file"), (b"\n \n", "holds no prompts"), (b"\xff\xfe", "cannot read")],
    )
    def test_a_file_without_prompts_is_bad_usage(self, config, stage, tmp_path, content, message):
        listed = tmp_path / "prompts.txt"
        if content is not None:
            listed.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            draw(config, f"@{listed}")


class TestNothingIsReplaced:
    """What was drawn before stays, whatever is drawn after it."""

    def test_the_same_words_again_get_a_number(self, config, stage):
        for _ in range(3):
            draw(config, "a dog")
        names = [f"base-a-dog-seed0{n}.{end}" for n in ("", "-2", "-3") for end in ("json", "mp4")]
        assert sorted(files(config.outputs)) == sorted(names)

    def test_prompts_that_begin_alike_have_names_of_their_own(self, config, stage):
        draw(config, ALIKE + " and stops", ALIKE + " and falls")
        first, second = stage.calls[0]["outs"]
        assert first != second
        assert first.read_text() == ALIKE + " and stops"

    def test_a_json_alone_keeps_its_name_too(self, config, stage):
        config.outputs.mkdir()
        (config.outputs / "base-a-dog-seed0.json").write_text("mine")
        draw(config, "a dog")
        assert files(config.outputs)["base-a-dog-seed0.json"] == b"mine"
        assert stage.calls[0]["outs"][0].name == "base-a-dog-seed0-2.mp4"

    @pytest.mark.parametrize("end", ["mp4", "json"])
    def test_a_named_file_that_is_there_is_refused_before_any_work(
        self, config, stage, tmp_path, end
    ):
        (tmp_path / f"dog.{end}").write_text("mine")
        with pytest.raises(ConfigError, match=rf"dog\.{end} already exists; .*--overwrite"):
            draw(config, "a dog", out=tmp_path / "dog.mp4")
        assert not stage.calls
        assert (tmp_path / f"dog.{end}").read_text() == "mine"

    def test_it_is_replaced_when_asked_for(self, config, stage, tmp_path):
        (tmp_path / "dog.mp4").write_text("old")
        draw(config, "a dog", out=tmp_path / "dog.mp4", overwrite=True)
        assert (tmp_path / "dog.mp4").read_text() == "a dog"

    def test_a_drawing_that_fails_leaves_what_was_there_and_nothing_else(
        self, config, stage, tmp_path
    ):
        stage.fails = True
        (tmp_path / "dog.mp4").write_text("old")
        for out, overwrite in ((tmp_path / "dog.mp4", True), (tmp_path / "cat.mp4", False)):
            with pytest.raises(ValueError, match="luck"):
                draw(config, "a dog", out=out, overwrite=overwrite)
        with pytest.raises(ValueError, match="luck"):
            draw(config, "a dog")
        assert (tmp_path / "dog.mp4").read_text() == "old"
        assert not (tmp_path / "cat.mp4").exists()
        assert not files(config.outputs)

    def test_a_folder_that_takes_no_file_is_told_before_any_work(self, config, stage, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError):
            draw(config, "a dog", out=tmp_path / "file" / "dog.mp4")
        assert not stage.calls

    def test_two_processes_get_two_names(self, tmp_path):
        with claim_new_file(tmp_path, "dog") as first, claim_new_file(tmp_path, "dog") as second:
            assert [first.name, second.name] == ["dog.mp4", "dog-2.mp4"]
        assert not files(tmp_path)

    def test_a_folder_is_no_video_to_replace(self, tmp_path):
        (tmp_path / "dog.mp4").mkdir()
        with pytest.raises(OSError), claim_named_file(tmp_path / "dog.mp4", overwrite=True):
            pass
        assert (tmp_path / "dog.mp4").is_dir()


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A dog, [running]!", "run-a-dog-running-seed7"),
        ("?!", "run-video-seed7"),
        ("x" * 60, f"run-{'x' * 60}-seed7"),
    ],
)
def test_names_are_made_of_words(prompt, stem):
    assert file_stem("run", prompt, 7) == stem


@pytest.mark.parametrize("letter", ["x", "é", "走", "\U00020000", "\udcff"])
def test_a_cut_name_fits_a_file_system_and_is_the_prompts_own(letter, tmp_path):
    stems = {file_stem("run", letter * 500 + end, 0) for end in "ab"}
    assert len(stems) == 2
    for stem in stems:
        (tmp_path / f"{stem}.mp4").touch()
