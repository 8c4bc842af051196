"""What the benchmarks share: the machine, time and memory, ratios of paired runs, the last line."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

NONE, ONE_A_CORE = "none", "one a core"


def machine(device: torch.device) -> str:
    """Name the processor or the GPU, and the threads torch computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__} on {torch.get_num_threads()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What a side is timed under."""

    others: str
    """Other processes of this benchmark: `none`, or `one a core`, each busy all the time."""
    threads: int


def conditions_of(device: torch.device) -> list[Condition]:
    """On a GPU, one."""
    if device.type == "cuda":
        return [Condition(others=NONE, threads=torch.get_num_threads())]
    counts = sorted({1, os.cpu_count() or 1})
    return [Condition(others=o, threads=n) for o, n in product((NONE, ONE_A_CORE), counts)]


@contextmanager
def other_processes(others: str) -> Iterator[None]:
    """Processes that compute all the time."""
    count = (os.cpu_count() or 1) if others == ONE_A_CORE else 0
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def now(device: torch.device) -> float:
    """Seconds, after all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held_bytes(device: torch.device) -> int:
    """Bytes that tensors on a GPU hold now; without one, this process's resident memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Start the high-water mark of `peak_bytes` again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """The most bytes held since `reset_peak`, as `held_bytes` counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM")


def _of_process(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def median_and_spread(values: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median, and the smallest and the largest value."""
    return statistics.median(values), [min(values), max(values)]


def paired_ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, list[float]]:
    """Median and spread of what is over what, run by run."""
    return median_and_spread([a / b for a, b in zip(over, under, strict=True)])


def shown(found: tuple[float, list[float]], digits: int) -> str:
    """The median and the spread."""
    median, (low, high) = found
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finish(name: str, text: str, summary: dict[str, Any], write_to: Path | None) -> None:
    """Print the tables and the summary as one line of JSON; keep both when asked to.

    Args:
        name: Of the benchmark.
        text: Markdown.
        summary: `ratio` or `value`, `target`, `spread`, `machine`, settings.
        write_to: A Markdown file that the report is added to, or None.
    """
    line = json.dumps({"name": name, **summary})
    if write_to is not None:
        title = "" if write_to.exists() else f"# {name}\n"
        settings = ", ".join(f"{key} {value}" for key, value in summary["settings"].items())
        head = f"{title}\n## {time.strftime('%Y-%m-%d')}, {summary['machine']}\n\n{settings}\n"
        with write_to.open("a", encoding="utf-8") as file:
            file.write(f"{head}\n{text}\n\n```\n{line}\n```\n")
    print(text, line, sep="\n\n")
