"""The command `report`."""

import json

from typer.testing import CliRunner

from pipeline.cli import app


def written(folder):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"settings": {}}')
    (folder / "config.yaml").write_text("train:\n  steps: 3\n")
    return folder


def test_the_page_of_the_run_in_the_settings_is_the_default(tmp_path):
    run = written(tmp_path / "run")
    done = CliRunner().invoke(app, ["report", f"train.run_dir={run}", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["report"] == str(run / "report.html")
    assert answer["bytes"] == (run / "report.html").stat().st_size
    assert answer["figures"]["steps"] == {"value": "0", "note": "of 3"}


def test_another_run_and_another_place_can_be_named(tmp_path):
    run, page = written(tmp_path / "run"), tmp_path / "pages" / "one.html"
    done = CliRunner().invoke(app, ["report", "--run", str(run), "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert page.is_file()
    assert not (run / "report.html").exists()


def test_a_folder_without_a_run_is_told(tmp_path):
    done = CliRunner().invoke(app, ["report", "--run", str(tmp_path)])
    assert done.exit_code == 1
    assert "holds no training run" in done.output
