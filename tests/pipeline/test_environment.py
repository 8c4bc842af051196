import json
import os
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

import pipeline.environment as module
from pipeline.environment import provenance, provenance_of_run, set_rank_from_slurm

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.fixture
def environment(monkeypatch):
    """The environment without any launcher: environment(**variables) sets some."""
    for name in list(os.environ):
        known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name.startswith("SLURM_") or name in known:
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def add(**variables):
        os.environ.update(variables)

    return add


@pytest.fixture
def scontrol(tmp_path, environment):
    """A `scontrol` that knows two nodes."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && echo gpu07 gpu08\n')
    program.chmod(0o755)
    environment(PATH=f"{tmp_path}:{os.environ['PATH']}")


def test_srun_alone_tells_each_process_its_place(environment, scontrol):
    environment(**STEP, SLURM_STEP_NODELIST="gpu[07-08]", SLURM_JOB_ID="123456")
    set_rank_from_slurm()
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["4", "3", "1", "gpu07", "29956"]


def test_an_address_that_is_set_stays(environment):
    environment(**STEP, MASTER_ADDR="head", MASTER_PORT="1234")
    set_rank_from_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # one torchrun per node, or a shell
        STEP | {"RANK": "0", "WORLD_SIZE": "1"},  # torchrun under srun
    ],
)
def test_other_processes_of_an_allocation_keep_their_place(environment, variables):
    environment(**variables)
    before = dict(os.environ)
    set_rank_from_slurm()
    assert dict(os.environ) == before


def test_without_scontrol_the_address_is_asked_for(environment, tmp_path):
    environment(**STEP, SLURM_STEP_NODELIST="gpu[07-08]", PATH=str(tmp_path))
    with pytest.raises(ValueError, match=r"gpu\[07-08\].*export MASTER_ADDR"):
        set_rank_from_slurm()
    assert "RANK" not in os.environ


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
