"""Rank and world size set by the launcher, and provenance: code and library versions."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cache_schema.shown_text import redacted


def set_rank_from_slurm() -> None:
    """Set RANK, WORLD_SIZE and the like, as torchrun would, for processes started by srun alone.

    Reads the variables of the job step only: those of the allocation are also set for a single
    process in it. Variables that a launcher has set are kept.

    Raises:
        ValueError: the first node's name cannot be determined.
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
            f"list their nodes ({nodes or 'SLURM_STEP_NODELIST is not set'}); export MASTER_ADDR, "
            "the first node's name, in the batch script"
        )
    return names[0]


def rank() -> int:
    """Return this process's rank, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's rank on its machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


_LIBRARIES = (
    "torch",
    "sam2",
    "diffusers",
    "transformers",
    "peft",
    "deepspeed",
    "numpy",
    "zarr",
    "numcodecs",
    "av",
)


def provenance_of_run() -> dict[str, Any]:
    """Return `provenance` plus this command's arguments and the current time in UTC.

    For files written once per run, such as `store.json`.
    """
    return provenance() | {
        "arguments": redacted(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def provenance() -> dict[str, Any]:
    """Return versions and the commit, as JSON values.

    Without times, host names and folders, so that the same work writes the same bytes again.
    """
    return {
        "sam2videox": _version("sam2videox"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Run git on this code's own checkout; None if it is installed without one."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        completed = subprocess.run(  # fixed arguments, no shell
            ["git", "-C", str(checkout), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip()
