"""How much memory stage one needs for a clip, against sam2's own predictor run twice.

    python tests/benchmarks/stage_one_memory.py --frames 49 --image-size 1024

Every side runs in a process of its own, which says how far its memory grew above what it held
with the model loaded. On a GPU that is memory allocated on it, otherwise resident memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import finish, machine, median_and_spread, table
from sam2_sides import Ours, Stock, make_frames, random_checkpoint

TARGET = 0.5
STOCK = "stock, twice"
OURS = {
    "cpu": ("ours, encoded frames in memory", "ours, encoded frames on disk"),
    "cuda": ("ours, encoded frames on the GPU", "ours, encoded frames on the host"),
}
KEEP = {"memory": "device", "disk": "disk", "GPU": "device", "host": "host"}


def resident_bytes(field: str) -> int:
    """This process's VmRSS (now) or VmHWM (at most so far)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def measure(side: str, options: argparse.Namespace) -> dict[str, int]:
    """Run one side in this process and say what it took."""
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
        # The frames that ours is handed count as its own.
        runner = Ours(*common, frames_THWC[:1], keep_encoded=KEEP[side.split()[-1]])
    cuda = torch.device(options.device).type == "cuda"
    loaded = torch.cuda.memory_allocated() if cuda else resident_bytes("VmRSS")
    if not cuda:
        # Loading a model takes more than holding it: start the high-water mark again.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if isinstance(runner, Ours):
        runner.set_frames(frames_THWC)
    runner.run(mask_HW)
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    return {"model": loaded, "peak": peak}


def in_a_process(side: str, options: argparse.Namespace, checkpoint: Path) -> dict[str, int]:
    """Run one side in a new process."""
    arguments = [
        f"--architecture={options.architecture}",
        f"--image-size={options.image_size}",
        f"--frames={options.frames}",
        f"--device={options.device}",
        f"--side={side}",
        f"--checkpoint={checkpoint}",
    ]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="sam2.1_hiera_t")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=49)
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
        found: dict[str, list[dict[str, int]]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side in sides:
                found[side].append(in_a_process(side, options, checkpoint))
    rows, above = [], {}
    for side, runs in found.items():
        peak, (low, high) = median_and_spread([run["peak"] / 2**20 for run in runs])
        above[side] = median_and_spread([run["peak"] - run["model"] for run in runs])[0]
        rows.append([side, f"{peak:.0f}", f"{low:.0f} to {high:.0f}", f"{above[side] / 2**20:.0f}"])
    leanest = sides[-1]
    ratios = [
        ours["peak"] / stock["peak"]
        for stock, ours in zip(found[STOCK], found[leanest], strict=True)
    ]
    ratio, spread = median_and_spread(ratios)
    finish(
        "stage_one_memory",
        table(["side", "peak, MiB", "spread", "above the loaded model, MiB"], rows),
        {
            "ratio": round(ratio, 3),
            "target": TARGET,
            "spread": [round(value, 3) for value in spread],
            "ratio_above_the_model": round(above[leanest] / above[STOCK], 3),
            "machine": machine(torch.device(options.device)),
            "settings": {
                key: str(getattr(options, key)) for key in ("architecture", "image_size", "frames")
            },
        },
        options.write,
    )


if __name__ == "__main__":
    main()
