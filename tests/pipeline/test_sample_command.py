"""`sample`: prompts, weights, and output files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands import sample
from pipeline.commands.sample import SampleOptions
from pipeline.config.load import ConfigError
from stages.progress import SilentProgress
from stages.sample_videos import batch
from stages.sample_videos.config import SampleConfig

QUIET = SilentProgress()


@pytest.fixture
def config(config):
    return config.model_copy(update={"sample": SampleConfig(device="cpu")})


@pytest.fixture
def drawn(fake_models, monkeypatch):
    """Stands in for the models; returns what was drawn, with the name of the weights."""
    calls = []

    def generate(model, requests, *, device, progress):
        for request in requests:
            calls.append((model.name, request.prompt, request.seed))
            shape = (model.size.num_frames, model.size.height, model.size.width, 3)
            yield np.full(shape, np.nan if request.prompt == "a nan" else 0.5, np.float32)

    monkeypatch.setattr(batch, "generate_videos", generate)
    return calls


def finish(config, name="one"):
    run = config.train.run_dir.parent / name
    run.mkdir(parents=True)
    (run / "finished.json").touch()
    (run / "config.yaml").write_text(f"model: {{path: {config.model.path}}}\n")
    return run


def draw(config, *prompts, base_only=True, **options):
    return sample.run(config, QUIET, SampleOptions(prompts=prompts, base_only=base_only, **options))


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_the_newest_finished_run_is_the_default(config, drawn):
    run = finish(config)
    answer = draw(config, "A dog, [running]!", base_only=False)
    assert drawn == [("one", "A dog, [running]!", 0)]
    (video,) = answer.data["videos"]
    assert video["run"] == str(run)
    assert video["state"] == "made"
    assert answer.notes == [video["video"]]
    path = Path(video["video"])
    assert path.is_file()
    assert path.name == "A dog, [running]!-0.mp4"
    assert path.parent.name.startswith("one-")


def test_beside_the_video_lies_how_it_was_made(config, drawn, tmp_path):
    draw(config, "a dog", out=tmp_path / "dog.mp4")
    record = json.loads((tmp_path / "dog.json").read_text())
    assert (record["prompt"], record["seed"], record["run"]) == ("a dog", 0, None)
    assert record["made_with"]["python"]


def test_without_a_finished_run_the_remedies_are_named(config, drawn):
    with pytest.raises(ValueError, match=r"no finished run of base in .*--base"):
        draw(config, "a dog", base_only=False)
    assert not drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, "with --prompt TEXT or --prompt-file FILE"),
        ({"prompts": (" ",)}, "the prompt is empty"),
        ({"out": Path("dog.avi")}, r"ends in \.mp4 or \.gif, or is a folder, got dog\.avi"),
        ({"out": Path("dog.MP4")}, r"ends in \.mp4 or \.gif"),
        ({"run_dir": Path("run")}, "remove --run"),
        ({"prompts": ("a", "b"), "out": Path("x.mp4")}, "names one video, but there are 2"),
        ({"num": 2, "out": Path("x.gif")}, "names one video, but there are 2"),
        ({"seeds": (1, 2), "num": 2}, "--num counts up from one seed"),
        ({"compare": "base", "out": Path("x.mp4")}, "--out must be a folder, got x.mp4"),
        ({"out": Path("x.mp4"), "form": "gif"}, "--out x.mp4 and --format gif differ"),
        ({"compare": "base", "form": "gif"}, "--compare shows two videos in one mp4"),
        ({"compare": "base"}, "--compare base has the weights that are compared"),
    ],
)
def test_what_does_not_go_together_is_bad_usage(config, drawn, options, message):
    defaults = SampleOptions(prompts=("a dog",), base_only=True)
    with pytest.raises(ConfigError, match=message):
        sample.run(config, QUIET, dataclasses.replace(defaults, **options))
    assert not drawn
    assert not config.outputs.exists()


class TestPrompts:
    def test_come_from_the_line_and_from_a_file(self, config, drawn, tmp_path):
        listed = tmp_path / "prompts.csv"
        listed.write_text("prompt,seed\na cat,7\na bird,\n")
        answer = draw(config, "a dog", "a dog", prompt_file=listed, num=2)
        assert drawn == [
            ("base", text, seed)
            for text, first in (("a dog", 0), ("a cat", 7), ("a bird", 0))
            for seed in (first, first + 1)
        ]
        assert len(answer.data["videos"]) == 6

    def test_use_the_seed_of_the_settings_unless_one_is_given(self, config, drawn):
        config = config.model_copy(update={"sample": SampleConfig(seed=5, device="cpu")})
        draw(config, "a dog")
        draw(config, "a dog", seeds=(3, 4))
        assert [seed for _, _, seed in drawn] == [5, 3, 4]

    @pytest.mark.parametrize("mark", ["", "@"])
    def test_a_file_given_as_words_is_refused_with_the_hint(self, config, drawn, tmp_path, mark):
        (tmp_path / "prompts.txt").write_text("a dog\n")
        with pytest.raises(ConfigError, match=r"is a file; .* with --prompt-file .*prompts\.txt"):
            draw(config, f"{mark}{tmp_path / 'prompts.txt'}")
        assert not drawn

    def test_a_prompt_longer_than_any_path_is_a_prompt(self, config, drawn):
        draw(config, "word " * 2000)
        assert len(drawn) == 1

    def test_a_bad_prompt_file_is_bad_usage(self, config, drawn, tmp_path):
        (tmp_path / "p.csv").write_text("prompt,sead\na dog,1\n")
        with pytest.raises(ConfigError, match="line 2: unknown sead"):
            draw(config, prompt_file=tmp_path / "p.csv")
        assert not drawn


class TestWhatIsThere:
    def test_is_kept(self, config, drawn):
        draw(config, "a dog")
        answer = draw(config, "a dog", "a cat")
        assert drawn == [("base", "a dog", 0), ("base", "a cat", 0)]
        assert [video["state"] for video in answer.data["videos"]] == ["kept", "made"]
        assert ("already there", "1 of 2") in answer.rows

    def test_is_never_replaced_unasked(self, config, drawn, tmp_path):
        (tmp_path / "dog.mp4").write_text("mine")
        with pytest.raises(ConfigError, match=r"dog\.mp4 exists.*give another --out, or --overwri"):
            draw(config, "a dog", out=tmp_path / "dog.mp4")
        assert not drawn
        assert (tmp_path / "dog.mp4").read_text() == "mine"
        draw(config, "a dog", out=tmp_path / "dog.mp4", overwrite=True)
        assert (tmp_path / "dog.mp4").stat().st_size > 100

    def test_other_settings_go_to_a_folder_of_their_own(self, config, drawn, tmp_path):
        draw(config, "a dog")
        faster = config.model_copy(update={"sample": SampleConfig(steps=9, device="cpu")})
        draw(faster, "a dog")
        assert len(drawn) == 2
        assert len(list(config.outputs.iterdir())) == 2
        draw(config, "a dog", out=tmp_path / "videos")
        with pytest.raises(ConfigError, match="with steps 50 instead of 9"):
            draw(faster, "a dog", out=tmp_path / "videos")


class TestCompare:
    def test_writes_both_and_each_pair(self, config, drawn, tmp_path):
        run = finish(config, "lgf")
        answer = draw(
            config, "a dog", base_only=False, run_dir=run, compare="base", out=tmp_path / "both"
        )
        assert drawn == [("lgf", "a dog", 0), ("base", "a dog", 0)]
        assert names(tmp_path / "both") == sorted(
            f"{folder}/a dog-0.{end}"
            for folder in ("base", "lgf", "lgf-vs-base")
            for end in ("json", "mp4")
        )
        pair = str(tmp_path / "both" / "lgf-vs-base" / "a dog-0.mp4")
        assert answer.data["comparisons"] == answer.notes == [pair]

    def test_two_runs_of_one_name_need_folders_of_their_own(self, config, drawn, tmp_path):
        runs = [finish(config, f"{parent}/lgf") for parent in "ab"]
        with pytest.raises(ConfigError, match="both models are named lgf"):
            draw(
                config,
                "a dog",
                base_only=False,
                run_dir=runs[0],
                compare=str(runs[1]),
                out=tmp_path / "both",
            )
        answer = draw(config, "a dog", base_only=False, run_dir=runs[0], compare=str(runs[1]))
        assert len(answer.data["comparisons"]) == 1
        assert len(list(config.outputs.iterdir())) == 3


def test_a_video_that_fails_is_reported_with_exit_code_3(config, drawn):
    answer = draw(config, "a dog", "a nan")
    assert answer.exit_code == 3
    (problem,) = answer.data["problems"]
    assert problem.endswith("a nan-0.mp4")
    assert [video["state"] for video in answer.data["videos"]] == ["made", "failed"]


def test_processes_of_a_launcher_share_the_videos(config, drawn, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    prompts = [f"prompt {number}" for number in range(7)]
    for rank in (1, 0, 2):
        monkeypatch.setenv("RANK", str(rank))
        answer = draw(config, *prompts)
    assert sorted(drawn) == sorted(("base", text, 0) for text in prompts)
    assert ("videos", "7, 2 of them by this process") in answer.rows
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert {one["state"] for one in draw(config, *prompts).data["videos"]} == {"kept"}


def test_many_paths_are_shown_as_their_folder(config, drawn):
    answer = draw(config, "a dog", num=9)
    (note,) = answer.notes
    assert Path(note).is_dir()
