"""Results of the check: one JSON file per part, a row per command, never overwritten by others.

{"part": "step", "title": "…", "rows": [
    {"measurement": "features", "size": "full", "machine": {…}, "code": "3fa1…",
     "outcome": "measured", "seconds": 212.4, "result": {…}, "output": null}]}
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.environment import provenance
from tests.benchmarks.gpu_check.parts import ROOT, Part

_CODE = ("cache_schema", "stages", "pipeline", "tests/benchmarks", "tests/gpu")
# In a process of its own: this one must hold no memory on the GPU while others are measured.
_GPU_FACTS = """
import json, torch
facts = {"gpu": None, "torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    memory = torch.cuda.get_device_properties(0).total_memory
    facts |= {"gpu": torch.cuda.get_device_name(0), "gpu_mib": memory >> 20}
print(json.dumps(facts))
"""

Row = dict[str, Any]


def machine_facts() -> dict[str, Any]:
    """Name GPU, driver, processor, torch and libraries; `gpu` is None without one."""
    answer = subprocess.run(
        [sys.executable, "-c", _GPU_FACTS], check=True, stdout=subprocess.PIPE, text=True
    )
    known = provenance()
    return json.loads(answer.stdout.splitlines()[-1]) | {
        "driver": _driver(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "python": known["python"],
        "libraries": known["libraries"],
        "commit": known["commit"],
        "uncommitted_changes": known["uncommitted_changes"],
    }


def _driver() -> str | None:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_hash() -> str:
    """Hash the Python files that a measurement depends on; a copy without git has one too."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def same_setting(row: Row, other: Row) -> bool:
    """Whether two rows are of one measurement, size, code and kind of machine."""
    keys = ("measurement", "size", "code")
    facts = ("gpu", "torch", "cuda", "cpu")
    return all(row[key] == other[key] for key in keys) and all(
        row["machine"].get(fact) == other["machine"].get(fact) for fact in facts
    )


def read_rows(folder: Path, part: Part) -> list[Row]:
    """Read the rows of a part; none if it has not been run."""
    file = folder / f"{part.name}.json"
    if not file.is_file():
        return []
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def add_row(folder: Path, part: Part, rows: Sequence[Row], row: Row) -> list[Row]:
    """Write a part's file with one more row, in place of an earlier one of the same setting."""
    kept = [*(one for one in rows if not same_setting(one, row)), row]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{part.name}.json.unfinished"
    content = {"part": part.name, "title": part.title, "rows": kept}
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / f"{part.name}.json")
    return kept
