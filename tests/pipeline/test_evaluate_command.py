"""The command `evaluate`."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from stages.clips import write_video

APPEARANCE = "evaluate.scores=[appearance]"


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
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), APPEARANCE])


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
