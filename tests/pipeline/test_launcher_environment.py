import os

import pytest

from pipeline.environment import set_rank_from_slurm

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
