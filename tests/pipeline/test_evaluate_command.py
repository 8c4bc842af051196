"""The command `evaluate`."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from pipeline.cli import app
from stages.clips import write_video
from stages.sample_videos import batch
from stages.students import hub, sampler
from tests.fingerprints import fingerprint_of

APPEARANCE, STRUCTURE = (f"evaluate.scores=[{group}]" for group in ("appearance", "structure"))
TEXT = {"text": ArraySpec(dtype="float32", shape=(2, 3), dimension_names=("token", "channel"))}


def write_json(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def videos(tmp_path):
    """Returns a function that writes noise videos of one brightness each."""

    def write(folder, **levels):
        for key, level in levels.items():
            noise = np.random.default_rng(0).integers(0, 40, (2, 16, 16, 3), dtype=np.uint8)
            write_video(tmp_path / folder / f"{key}-0.mp4", noise + np.uint8(level), 8.0)
        return tmp_path / folder

    return write


def evaluate(*arguments):
    """Run the command; only appearance is scored unless the arguments name other scores."""
    given = [str(one) for one in arguments]
    scores = [] if STRUCTURE in given else [APPEARANCE]
    return CliRunner().invoke(app, ["evaluate", *given, *scores])


def test_one_side_is_scored(videos, tmp_path):
    done = evaluate(videos("a", dog=100, cat=150), "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["page"] == str(tmp_path / "out" / "index.html")
    (mean,) = answer["scores"]["brightness"]["means"]
    assert mean["count"] == 2
    # Noise of 0 to 39 over 100 and 150, in limited-range 4:2:0.
    assert mean["mean"] == pytest.approx((125 + 19.5) / 255, abs=0.01)


def test_two_sides_are_compared_in_pairs(videos, tmp_path):
    bright, dark = videos("bright", dog=150, cat=160), videos("dark", dog=100, cat=110)
    done = evaluate(bright, "--against", dark, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["scores"]["brightness"]["difference"]
    assert found["difference"]["mean"] == pytest.approx(50 / 255, abs=0.01)
    assert found["win_rate"] is None


def test_too_many_videos_without_partner_exit_with_3(videos, tmp_path):
    first, second = videos("a", dog=100, cat=100), videos("b", dog=100)
    done = evaluate(first, "--against", second, "--out", tmp_path / "out")
    assert done.exit_code == 3
    assert "33% of the videos lack scores or a partner" in " ".join(done.output.split())
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_folder_is_not_compared_with_itself(videos, tmp_path):
    folder = videos("a", dog=100)
    done = evaluate(folder, "--against", folder, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_outputs_are_named_after_the_folder(videos, tmp_path):
    done = evaluate(videos("lgf", dog=100), f"outputs={tmp_path / 'outputs'}", "--json")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "outputs" / "evaluation-lgf" / "scores.csv").is_file()


def test_several_processes_are_refused(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = evaluate(videos("a", dog=100), "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "evaluate runs in one process" in done.output


class TestRun:
    """`--run` samples before it scores."""

    @pytest.fixture
    def fake(self, fake_models, monkeypatch, tmp_path):
        """Stands in for the models: the brightness of a video is its weights' own."""
        drawn = []

        def generate(model, requests, *, device, progress):
            for request in requests:
                drawn.append((model.name, request.prompt, request.seed))
                noise_THWC = np.random.default_rng(request.seed).random((9, 32, 48, 3)) / 8
                level = 0.25 if model.run_dir is None else 0.5
                level = np.nan if request.prompt == "a nan" else level
                yield (noise_THWC + level).astype(np.float32)

        monkeypatch.setattr(batch, "generate_videos", generate)
        run = tmp_path / "runs" / "lgf"
        write_json(run / "run.json", settings={}, clip_digests={}, held_out=["walk/1", "run/0"])
        return drawn

    def evaluate(self, tmp_path, *arguments):
        return evaluate(
            *("--run", tmp_path / "runs" / "lgf", "--out", tmp_path / "out", *arguments, "--json"),
            *(f"cache={tmp_path / 'cache'}", "model.path=base", "sample.device=cpu"),
            *("data.path=clips", "data.num_frames=9", "data.height=32", "data.width=48"),
        )

    def write_captions(self, tmp_path):
        settings = StoreSettings(kind="text", arrays=TEXT, values={})
        writer = StoreWriter.open(tmp_path / "cache", settings, provenance={})
        with writer.shard("00000", source="00000.tar") as shard:
            for key in ("walk/0", "walk/1", "run/0"):
                shard.add(
                    key,
                    {"text": np.zeros((2, 3), np.float32)},
                    {"caption": f"caption of {key}"},
                    fingerprint=fingerprint_of(key),
                )
            shard.commit()
        writer.write_index()

    def test_samples_the_held_out_captions_of_both_models(self, fake, tmp_path, monkeypatch):
        self.write_captions(tmp_path)
        monkeypatch.setattr(hub, "resolve_base_model", lambda *_: None)
        monkeypatch.setattr(sampler, "takes_image", lambda _: False)
        done = self.evaluate(tmp_path, "--against", "base", "--num", "2")
        assert done.exit_code == 0, done.output
        assert fake == [
            (name, f"caption of {key}", seed)
            for name in ("lgf", "base")
            for key in ("walk/1", "run/0")
            for seed in (0, 1)
        ]
        answer = json.loads(done.stdout)
        assert [side["name"] for side in answer["sides"]] == ["lgf", "base"]
        difference = answer["scores"]["brightness"]["difference"]["difference"]
        assert (difference["count"], difference["prompts"]) == (4, 2)
        assert difference["mean"] == pytest.approx(0.25, abs=0.01)

    def test_what_is_there_is_not_sampled_again(self, fake, tmp_path):
        (tmp_path / "p.txt").write_text("a dog\na cat\n")
        self.evaluate(tmp_path, "--prompt-file", tmp_path / "p.txt")
        (tmp_path / "p.txt").write_text("a cat\na bird\n")
        done = self.evaluate(tmp_path, "--prompt-file", tmp_path / "p.txt")
        assert fake == [("lgf", text, 0) for text in ("a dog", "a cat", "a bird")]
        assert json.loads(done.stdout)["sides"][0]["videos"] == 2, "the dog is of another set"

    def test_a_folder_of_videos_may_be_the_other_side(self, fake, tmp_path, videos):
        (tmp_path / "p.txt").write_text("dog\ncat\n")
        other = videos("lgf", dog=100, cat=120)
        done = self.evaluate(tmp_path, "--prompt-file", tmp_path / "p.txt", "--against", other)
        assert done.exit_code == 0, done.output
        answer = json.loads(done.stdout)
        assert answer["pairs"] == 2
        assert [side["name"] for side in answer["sides"]] == ["lgf", "lgf (against)"]

    def test_a_video_that_cannot_be_sampled_is_told_and_exits_with_3(self, fake, tmp_path):
        (tmp_path / "p.txt").write_text("a dog\na nan\na cat\n")
        done = self.evaluate(tmp_path, "--prompt-file", tmp_path / "p.txt")
        assert done.exit_code == 3
        assert json.loads(done.stdout)["sides"][0]["videos"] == 2
        assert json.loads(done.stdout)["not_sampled"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--run", "base"], "the base model holds no clips out of training"),
            (["--run", "base", "--against", "base", "--prompt-file", "p.txt"], "has the weights"),
        ],
    )
    def test_what_cannot_be_is_bad_usage(self, fake, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "p.txt").write_text("a dog")
        done = evaluate(*arguments, "model.path=base", "sample.device=cpu", "--out", "out")
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())
        assert not fake


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["VIDEOS", "--reference", "VIDEOS"], "set evaluate.scores=[appearance,structure]"),
        (["VIDEOS", "--reference", "VIDEOS", STRUCTURE], "is the folder of videos itself"),
        (["VIDEOS", "--reference", "nowhere", STRUCTURE], "no reference clips at nowhere"),
        ([], "name a folder of videos, or a run"),
        (["VIDEOS", "--run", "base"], "name a folder of videos, or a run"),
        (["VIDEOS", "--num", "2"], "add --run RUN"),
        (["VIDEOS", "--against", "base"], "--against base needs --run"),
        (["nowhere"], "nowhere is not a folder"),
    ],
)
def test_sides_that_do_not_go_together_are_refused(
    videos, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    folder = str(videos("a", dog=100))
    done = evaluate(*(folder if one == "VIDEOS" else one for one in arguments), "--out", "out")
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
