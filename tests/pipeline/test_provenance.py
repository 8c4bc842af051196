import json
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pipeline.environment as module
from pipeline.environment import provenance, provenance_of_run


def test_names_the_libraries_that_decide_values():
    told = provenance()
    assert told["libraries"]["torch"] == metadata.version("torch")
    assert None not in told["libraries"].values()
    assert json.loads(json.dumps(told)) == told


def test_is_the_same_every_time_and_names_no_place():
    assert provenance() == provenance()
    assert str(Path.home()) not in json.dumps(provenance())


def test_a_run_tells_its_command_and_its_time(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sam2vx-pipeline", "extract-features", "--config", "demo"])
    before = datetime.now(UTC).replace(microsecond=0)
    told = provenance_of_run()
    assert told["arguments"] == ["extract-features", "--config", "demo"]
    assert before <= datetime.fromisoformat(told["date"]) <= datetime.now(UTC)
    assert told.items() >= provenance().items()


def test_the_command_is_kept_without_the_credentials_of_its_urls(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sam2vx-pipeline", "train", "cache=http://me:pw@host/c"])
    assert provenance_of_run()["arguments"] == ["train", "cache=http://***@host/c"]


def test_the_commit_is_that_of_the_codes_own_checkout(tmp_path, monkeypatch):
    package = tmp_path / "pipeline"
    package.mkdir()
    monkeypatch.setattr(module, "__file__", str(package / "provenance.py"))
    assert provenance()["commit"] is None

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (package / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert provenance()["commit"] == git("rev-parse", "HEAD").strip()
    assert provenance()["uncommitted_changes"] is False
    (package / "code.py").write_text("2")
    assert provenance()["uncommitted_changes"] is True
