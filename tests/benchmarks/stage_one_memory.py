"""How much memory stage one needs for a clip, against sam2's own predictor run twice.

    python tests/benchmarks/stage_one_memory.py --frames 49 --image-size 1024

Every side runs in a process of its own, at the same time as the others, and says how much memory it
held at most once the model was loaded: on a GPU, memory allocated on it, otherwise resident memory.
What both keep of the features is their resampling to the student's token grid. The stock side
starts each direction with a fresh state and lets go of it before the next.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from report import finish, machine, median_and_spread, peak_bytes, reset_peak, table
from sam2_sides import HEIGHT, WIDTH, Ours, Stock, make_frames, random_checkpoint

from stages.local_gram_flow import resample_to_grid
from stages.processes.allocator import return_freed_memory

TARGET = 0.5
STOCK = "stock, twice"
OURS = {
    "cpu": ("ours, encoded frames in memory", "ours, encoded frames on disk"),
    "cuda": ("ours, encoded frames on the GPU", "ours, encoded frames on the host"),
}
KEEP = {"memory": "device", "disk": "disk", "GPU": "device", "host": "host"}


def measure(side: str, options: argparse.Namespace) -> int:
    """Run one side in this process and say how many bytes it took."""
    frames_THWC, mask_HW = make_frames(options.frames)
    common = (
        options.architecture,
        options.image_size,
        options.device,
        options.checkpoint,
    )
    if side == STOCK:
        runner: Any = Stock(*common, frames_THWC)
    else:
        # As the pipeline does on a CPU; the frames that ours is handed count as its own.
        if options.device == "cpu":
            return_freed_memory()
        runner = Ours(*common, frames_THWC[:1], keep_encoded=KEEP[side.split()[-1]])
    # Loading a model takes more than holding it.
    reset_peak(torch.device(options.device))
    once = {}
    if isinstance(runner, Ours):
        runner.set_frames(frames_THWC)
        once = {"once": True}
    runner.run(
        mask_HW,
        keep=lambda maps_1CHW: resample_to_grid(maps_1CHW, HEIGHT // 16, WIDTH // 16),
        directions=options.directions,
        **once,
    )
    return peak_bytes(torch.device(options.device))


def in_processes(
    sides: Sequence[str], options: argparse.Namespace, checkpoint: Path
) -> dict[str, int]:
    """Run every side in a new process, all at once: memory does not depend on speed."""
    shared = ("architecture", "image_size", "frames", "directions", "device")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in shared]
    processes = {
        side: subprocess.Popen(
            [sys.executable, __file__, *arguments, f"--side={side}", f"--checkpoint={checkpoint}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in sides
    }
    found = {}
    for side, process in processes.items():
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{side} ended with {process.returncode}")
        found[side] = json.loads(printed.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="sam2.1_hiera_t")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--directions", type=int, choices=(1, 2), default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.side:
            link = Path(name) / "weights.pt"
            link.symlink_to(options.checkpoint)
            options.checkpoint = link
            print(json.dumps(measure(options.side, options)))
            return
        checkpoint = Path(name) / "weights.pt"
        random_checkpoint(options.architecture, options.image_size, checkpoint)
        sides = (STOCK, *OURS[torch.device(options.device).type])
        found: dict[str, list[int]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, taken in in_processes(sides, options, checkpoint).items():
                found[side].append(taken)
    rows = []
    for side, peaks in found.items():
        peak, (low, high) = median_and_spread([peak / 2**20 for peak in peaks])
        rows.append([side, f"{peak:.0f}", f"{low:.0f} to {high:.0f}"])
    ratio, spread = median_and_spread(
        [ours / stock for stock, ours in zip(found[STOCK], found[sides[-1]], strict=True)]
    )
    finish(
        "stage_one_memory",
        table(["side", "peak, MiB", "spread"], rows),
        {
            "ratio": round(ratio, 3),
            "target": TARGET,
            "peak_mib": {side: max(peaks) >> 20 for side, peaks in found.items()},
            "spread": [round(value, 3) for value in spread],
            "machine": machine(torch.device(options.device)),
            "settings": {
                key: str(getattr(options, key))
                for key in ("architecture", "image_size", "frames", "directions")
            },
        },
        options.write,
    )


if __name__ == "__main__":
    main()
