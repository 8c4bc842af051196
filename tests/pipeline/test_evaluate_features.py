"""The command `evaluate` with a network for feature distances."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from stages.clips import write_video
from tests.tiny_i3d import save_tiny_i3d


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    save_tiny_i3d(path)
    return path


@pytest.fixture
def videos(tmp_path):
    """Returns a function that writes videos of noise."""

    def write(folder, *keys, frames=4, level=0):
        for seed, key in enumerate(keys):
            noise = np.random.default_rng(seed).integers(0, 99, (frames, 32, 48, 3), np.uint8)
            write_video(tmp_path / folder / f"{key}-0.mp4", noise + np.uint8(level), 8.0)
        return tmp_path / folder

    return write


@pytest.fixture
def evaluate(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(
            app,
            [
                *("evaluate", *map(str, arguments), "evaluate.scores=[vbench]"),
                *(f"outputs={tmp_path / 'outputs'}", "extract.device=cpu"),
                *("data.height=32", "data.width=48", "evaluate.features.num_frames=4"),
            ],
        )

    return run


def words(output):
    """The words of a table, without its lines."""
    return " ".join(output.replace("│", " ").split())


KEYS = [f"video {number}" for number in range(10)]


def test_distances_are_printed_and_written_with_what_they_depend_on(
    network, videos, evaluate, tmp_path
):
    side, real = videos("lgf", *KEYS), videos("real", *KEYS, level=60)
    setting = f"evaluate.features.network={network}"
    done = evaluate(side, "--reference", real, setting)
    assert done.exit_code == 0, done.output
    shown = words(done.output)
    for part in (
        "i3d_torchscript.pt (SHA-256",
        "first 4 frames at 8 fps, 32x48",
        "Frechet, lgf to real none: it needs 256 videos",
        "MMD^2, lgf to real",
        "10 and 10 videos",
    ):
        assert part in shown
    out = tmp_path / "outputs" / "evaluation-lgf"
    features = json.loads((out / "summary.json").read_text())["features"]
    assert features["network"] == "i3d_torchscript.pt" and features["num_frames"] == 4
    assert features["distances"][0]["mmd"]["value"] is not None
    page = (out / "index.html").read_text()
    assert "Feature distances" in page and "first 4 frames at 8 fps" in page
    assert len(list((tmp_path / "outputs" / "features").rglob("*.safetensors"))) == 2

    asked = evaluate(
        side, "--reference", real, setting, "evaluate.features.allow_few=true", "--json"
    )
    distance = json.loads(asked.stdout)["features"]["distances"][0]["frechet"]
    assert distance["value"] > 0 and distance["note"].startswith("biased")


def test_a_missing_network_stops_before_any_work(videos, evaluate, tmp_path):
    side, real = videos("lgf", "a"), videos("real", "a")
    done = evaluate(side, "--reference", real, "evaluate.features.network=gone.pt")
    assert done.exit_code == 2
    assert "evaluate.features.network: there is no file gone.pt" in words(done.output)
    assert not (tmp_path / "outputs").exists()


def test_short_videos_count_as_skipped(network, videos, evaluate):
    side, other = videos("lgf", *KEYS, frames=3), videos("base", *KEYS)
    done = evaluate(side, "--against", other, f"evaluate.features.network={network}")
    assert done.exit_code == 3
    shown = words(done.output)
    assert "no features: too_short: 3 frames at 8 frames/s, needs 4" in shown
    assert "50% of the videos lack scores" in shown


def test_one_side_alone_has_no_distances(network, videos, evaluate):
    done = evaluate(videos("lgf", "a"), f"evaluate.features.network={network}")
    assert done.exit_code == 0, done.output
    shown = words(done.output)
    assert "no feature distances without --against or --reference" in shown


def test_sides_of_one_name_are_told_apart(network, videos, evaluate):
    first, second = videos("one/lgf", *KEYS), videos("two/lgf", *KEYS, level=30)
    done = evaluate(first, "--against", second, f"evaluate.features.network={network}", "--json")
    [found] = json.loads(done.stdout)["features"]["distances"]
    assert found["first"] != found["second"]
