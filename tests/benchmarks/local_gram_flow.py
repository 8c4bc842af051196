"""The Gram flow's similarities, forward and backward, against the usual form by `F.unfold`.

    python tests/benchmarks/local_gram_flow.py

Unfold copies each map once for every neighbour and multiplies; here matrix products over rows of
tokens do it. Times are of both sides in turn, in one process. Without a GPU they are taken on one
thread and on as many as there are cores, each without and with one process per core that computes
all the time: threads wait for each other after every operation, and one that is not running delays
them. Memory is what each side adds, at most, to inputs that are there already, in a process of its
own: on a GPU memory allocated on it, otherwise resident memory. Values and gradients are compared
with the unfold form in float64.

On a GPU (`--dtype bfloat16` too) two more sides run: the Triton kernel, and what torch.compile
makes of the matrix products; each side's share of the memory's rate is the bytes of inputs and
outputs, moved once, over what the side took, as a share of the rate of a copy.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from report import (
    Condition,
    conditions_of,
    finish,
    held_bytes,
    machine,
    median_and_spread,
    now,
    other_processes,
    paired_ratios,
    peak_bytes,
    reset_peak,
    shown,
    table,
)
from torch import Tensor

from stages.local_gram_flow import local_gram_flow

# Legend: B clip, T frame, N = B * (T-1), H W token grid, C channel, K neighbour.

TARGETS = {"time": 20.0, "memory": 10.0}
TARGET_ERROR = 1e-6
OURS, UNFOLD = "ours", "unfold"
SIDES_OF = {"cpu": (OURS, UNFOLD), "cuda": (OURS, "triton", "compiled", UNFOLD)}
_COPIED_BYTES = 2**28


def by_unfold(features_BTHWC: Tensor, radius: int) -> Tensor:
    """The same similarities from a copy of the features per neighbour."""
    dtype = torch.promote_types(features_BTHWC.dtype, torch.float32)
    unit_BTHWC = F.normalize(features_BTHWC.to(dtype), dim=-1)
    current_NHWC, next_NHWC = (x.flatten(0, 1) for x in (unit_BTHWC[:, :-1], unit_BTHWC[:, 1:]))
    N, H, W, C = current_NHWC.shape
    K = (2 * radius + 1) ** 2
    columns = F.unfold(next_NHWC.permute(0, 3, 1, 2), 2 * radius + 1, padding=radius)
    neighbours_NHWKC = columns.view(N, C, K, H, W).permute(0, 3, 4, 2, 1)
    flow_NHWK = torch.einsum("nhwc,nhwkc->nhwk", current_NHWC, neighbours_NHWKC)
    return flow_NHWK.unflatten(0, features_BTHWC[:, 1:].shape[:2])


SIDES: dict[str, Callable[[Tensor, int], Tensor]] = {
    OURS: local_gram_flow,
    "triton": partial(local_gram_flow, kernel="triton"),
    "compiled": torch.compile(local_gram_flow),
    UNFOLD: by_unfold,
}


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Features, and the gradient that comes back to the similarities."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, options.frames, options.height, options.width, options.channels)
    neighbours = (2 * options.radius + 1) ** 2
    features = torch.randn(shape, generator=generator).to(getattr(torch, options.dtype))
    upstream = torch.randn(1, shape[1] - 1, *shape[2:4], neighbours, generator=generator)
    return features.to(options.device), upstream.to(options.device)


def both_ways(
    side: Callable[[Tensor, int], Tensor], features: Tensor, upstream: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """Similarities, and the gradient of the features."""
    leaf = features.clone().requires_grad_(True)
    flow = side(leaf, radius)
    flow.backward(upstream)
    assert leaf.grad is not None
    return flow.detach(), leaf.grad


def largest_error(side: str, features: Tensor, upstream: Tensor, radius: int) -> float:
    """Of values, and of the gradient as a share of its largest, frame pair by frame pair."""
    worst = 0.0
    for first in range(features.shape[1] - 1):
        pair, back = features[:, first : first + 2], upstream[:, first : first + 1]
        found = both_ways(SIDES[side], pair, back, radius)
        exact = both_ways(by_unfold, pair.double(), back.double(), radius)
        for ours, truth in zip(found, exact, strict=True):
            scale = max(1.0, float(truth.abs().max()))
            worst = max(worst, float((ours.double() - truth).abs().max()) / scale)
    return worst


def added_bytes(side: str, options: argparse.Namespace) -> int:
    """What one side adds to its inputs at most, in this process."""
    features, upstream = inputs(options)
    warm_up(side, options)
    before = held_bytes(features.device)
    reset_peak(features.device)
    both_ways(SIDES[side], features, upstream, options.radius)
    return peak_bytes(features.device) - before


def share_of_copy(features: Tensor, upstream: Tensor, seconds: float) -> float:
    """Inputs and outputs, moved once in `seconds`, against what a copy moves in that time."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=features.device)
    target = torch.empty_like(source)
    took = []
    for _ in range(5):
        started = now(features.device)
        target.copy_(source)
        took.append(now(features.device) - started)
    moved = 2 * (features.nbytes + upstream.nbytes)
    return moved / seconds / (2 * _COPIED_BYTES / min(took))


def warm_up(side: str, options: argparse.Namespace) -> None:
    """Bring in libraries and thread pools."""
    smaller = {} if options.device.startswith("cuda") else {"frames": 2, "height": 8, "width": 8}
    small = argparse.Namespace(**vars(options) | smaller)
    both_ways(SIDES[side], *inputs(small), options.radius)


def measure_times(
    features: Tensor, upstream: Tensor, options: argparse.Namespace
) -> dict[Condition, dict[str, list[float]]]:
    """Seconds of every side under every condition, in turn, several times."""
    conditions, sides = conditions_of(features.device), SIDES_OF[features.device.type]
    found: dict[Condition, dict[str, list[float]]]
    found = {condition: {side: [] for side in sides} for condition in conditions}
    for _ in range(options.repeats):
        for condition in conditions:
            torch.set_num_threads(condition.threads)
            with other_processes(condition.others):
                for name in sides:
                    started = now(features.device)
                    both_ways(SIDES[name], features, upstream, options.radius)
                    found[condition][name].append(now(features.device) - started)
    return found


def measure_memory(side: str, options: argparse.Namespace) -> list[float]:
    """MiB that a side adds, several times; on a GPU it is the same each time."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
    repeats = 1 if options.device.startswith("cuda") else options.repeats
    return [int(subprocess.check_output(command, text=True)) / 2**20 for _ in range(repeats)]


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--height", type=int, default=30)
    parser.add_argument("--width", type=int, default=45)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--radius", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(added_bytes(options.side, options)))
        return
    device = torch.device(options.device)
    features, upstream = inputs(options)
    sides = SIDES_OF[device.type]
    for name in sides:
        warm_up(name, options)
    times = measure_times(features, upstream, options)
    memory = {name: median_and_spread(measure_memory(name, options)) for name in sides}
    ratios = {
        condition: paired_ratios(seconds[UNFOLD], seconds[OURS])
        for condition, seconds in times.items()
    }
    threads_over_one = {
        condition: paired_ratios(seconds[OURS], times[replace(condition, threads=1)][OURS])
        for condition, seconds in times.items()
        if device.type == "cpu"
    }
    rows = [
        [
            condition.others,
            str(condition.threads),
            *(shown(median_and_spread(seconds[name]), 3) for name in sides),
            shown(ratios[condition], 1),
            *(shown(found, 2) for found in [threads_over_one.get(condition)] if found),
        ]
        for condition, seconds in times.items()
    ]
    header = ["other processes", "threads", *(f"{name}, s" for name in sides), "unfold over ours"]
    header += ["ours over ours on one thread"] if threads_over_one else []
    errors = {
        side: largest_error(side, features, upstream, options.radius)
        for side in sides
        if side != UNFOLD
    }
    first = next(iter(times))
    further: dict[str, Any] = {"errors": errors}
    if device.type == "cuda":
        medians = {side: median_and_spread(found)[0] for side, found in times[first].items()}
        further["milliseconds"] = {side: round(1e3 * one, 3) for side, one in medians.items()}
        further["share_of_copy"] = {
            side: round(share_of_copy(features, upstream, min(times[first][side])), 3)
            for side in sides
        }
    else:
        for name, found in (("ratios", ratios), ("over_one_thread", threads_over_one)):
            further[name] = {
                f"{condition.others}, {condition.threads}": round(median, 2)
                for condition, (median, _) in found.items()
            }
    texts = [
        table(header, rows),
        table(
            ["side", "added at most, MiB"],
            [[name, shown(found, 1)] for name, found in memory.items()],
        ),
        f"Largest difference from float64, of values and gradients: {errors[OURS]:.1e}.",
    ]
    finish(
        "local_gram_flow",
        "\n\n".join(texts),
        {
            "ratio": round(ratios[first][0], 1),
            "target": TARGETS["time"],
            "spread": [round(value, 1) for value in ratios[first][1]],
            "ratio_memory": round(memory[UNFOLD][0] / memory[OURS][0], 1),
            "target_memory": TARGETS["memory"],
            "largest_error": errors[OURS],
            "target_error": TARGET_ERROR,
            **further,
            "machine": machine(device),
            "settings": {
                name: str(value)
                for name, value in vars(options).items()
                if name not in ("write", "side", "device")
            },
        },
        options.write,
    )


if __name__ == "__main__":
    main()
