"""Which process of a launched group this is; torchrun and deepspeed say so in the environment.

The command line asks first of all; where srun alone starts the processes, it says so for it.
"""

import os
import subprocess


def take_place_from_slurm() -> None:
    """Where srun alone starts several processes, tell each its place as torchrun would.

    Only a step's own variables count: those of the allocation are also set where one process runs
    in it. What a launcher has set already stays.

    Raises:
        ValueError: the first node's name cannot be found out.
    """
    size = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if size == "1" or "RANK" in os.environ:
        return
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_node()
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(29500 + job % 1000))
    os.environ["WORLD_SIZE"] = size
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]


def _first_node() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        names = []
    if not names:
        raise ValueError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} processes, but scontrol does not "
            f"name their nodes ({nodes or 'SLURM_STEP_NODELIST is not set'}); export MASTER_ADDR, "
            "the first node's name, in the batch script"
        )
    return names[0]


def rank() -> int:
    """Return this process's number, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
