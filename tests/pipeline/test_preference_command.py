"""The commands `preference make` and `preference read`."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from stages.clips import write_video


@pytest.fixture
def folders(tmp_path):
    for name, level in (("lgf", 160), ("base", 40)):
        for number in range(5):
            noise = np.random.default_rng(number).integers(0, 40, (2, 16, 16, 3), dtype=np.uint8)
            path = tmp_path / name / f"prompt {number}-0.mp4"
            write_video(path, noise + np.uint8(level), 8.0)
    return tmp_path / "lgf", tmp_path / "base"


def invoke(*arguments):
    return CliRunner().invoke(app, ["preference", *map(str, arguments)])


def answer(tmp_path, rater, prefers):
    """Write the answers of somebody who always prefers a model and sees every check."""
    key = json.loads((tmp_path / "page" / "key.json").read_text())
    answers = {}
    for question in key["questions"]:
        side = question["check"] or ("left" if question["left"] == prefers else "right")
        answers[question["id"]] = {"choice": side, "seconds": 4.0}
    path = tmp_path / f"{rater}.json"
    path.write_text(json.dumps({"page": key["page"], "rater": rater, "answers": answers}))
    return path


def test_a_page_is_made_and_its_answers_read(folders, tmp_path):
    made = invoke("make", *folders, "--out", tmp_path / "page", "--checks", 2, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["questions"] == 7
    assert (tmp_path / "page" / "index.html").is_file()
    files = [answer(tmp_path, "ann", "lgf"), answer(tmp_path, "bob", "base")]
    done = invoke("read", tmp_path / "page" / "key.json", *files, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (rate,) = found["win_rates"]
    assert (rate["first"], rate["second"], rate["wins"], rate["losses"]) == ("lgf", "base", 5, 5)
    assert rate["rate"]["mean"] == 0.5
    assert found["agreement"] < 0
    assert found["careless"] == {}


def test_the_table_says_who_won_and_who_looks_careless(folders, tmp_path):
    invoke("make", *folders, "--out", tmp_path / "page")
    file = answer(tmp_path, "ann", "lgf")
    content = json.loads(file.read_text())
    for of_question in content["answers"].values():
        of_question["seconds"] = 0.1
    file.write_text(json.dumps(content))
    done = invoke("read", tmp_path / "page" / "key.json", file)
    text = " ".join(done.output.split())
    assert "lgf against base" in text
    assert "5 won, 0 lost, 0 ties" in text
    assert "ann looks careless: 0.1 s per answer" in text


@pytest.mark.parametrize("arguments", [[0], [0, 0]])
def test_two_models_are_needed(folders, tmp_path, arguments):
    done = invoke("make", *(folders[n] for n in arguments), "--out", tmp_path / "page")
    assert done.exit_code == 2
    assert not (tmp_path / "page").exists()
