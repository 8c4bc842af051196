"""With which code and libraries a store or a run was made; kept beside it by every stage."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cache_schema.shown_text import redacted

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
    """Return `provenance` with this command's arguments and the time now, in UTC.

    For what is written once for a whole run, such as `store.json`.
    """
    return provenance() | {
        "arguments": redacted(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def provenance() -> dict[str, Any]:
    """Return versions and the commit, as JSON values.

    Neither times, host names nor folders: making the same thing twice must leave the same bytes.
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
    """Ask git about this code's own checkout; None where it is installed without one."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        answer = subprocess.run(  # fixed arguments, no shell
            ["git", "-C", str(checkout), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
