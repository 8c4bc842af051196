"""How much faster stage one tracks both ways than sam2's own predictor run twice.

    python tests/benchmarks/stage_one.py --architecture sam2.1_hiera_l --image-size 1024

The sides take turns in one process and must agree before a time counts. One more pass of ours,
outside the comparison, says where its time goes, decoding and writing included.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import (
    finish,
    held_bytes,
    machine,
    median_and_spread,
    now,
    peak_bytes,
    reset_peak,
    table,
)
from sam2_sides import HEIGHT, WIDTH, Ours, Stock, make_frames, random_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.clips import ClipRecord, ClipsConfig, encode_video, load_clip
from stages.compute_cost.flop_counter import matmul_flops_per_second
from stages.compute_cost.gpus import local_gpu
from stages.local_gram_flow import fuse_directions, resample_to_grid
from stages.precision import DTYPES
from stages.sam2_tracking.inputs import resize_for_sam2
from stages.students.latents import to_float16
from tests.fingerprints import fingerprint_of

TOLERANCE = 5e-6
TARGETS = {"cpu": 1.6, "cuda": 2.5}
PARTS = {
    "image_encoder": "image encoder",
    "memory_attention": "memory attention",
    "sam_prompt_encoder": "mask decoder",
    "sam_mask_decoder": "mask decoder",
    "memory_encoder": "memory encoder",
}


@contextmanager
def timed_parts(model: Any) -> Iterator[dict[str, float]]:
    """Seconds spent in each part of SAM2 while the block runs."""
    seconds: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}
    handles = []
    for name, part in PARTS.items():

        def before(*_: Any, name: str = name) -> None:
            started[name] = now(model.device)

        def after(*_: Any, name: str = name, part: str = part) -> None:
            seconds[part] += now(model.device) - started[name]

        module = getattr(model, name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def time_decoding(frames_THWC: np.ndarray, image_size: int) -> float:
    """Seconds to decode the clip from H.264 and squash its frames to SAM2's square."""
    record = ClipRecord(
        key="clip",
        video=encode_video(frames_THWC, 8.0),
        caption=None,
        prompts=(),
        last_frame_prompts=(),
        phrase=None,
    )
    length = (len(frames_THWC) - 1) // 8 * 8 + 1
    clips = ClipsConfig(path=Path(), num_frames=length, height=HEIGHT, width=WIDTH)
    started = now(torch.device("cpu"))
    resize_for_sam2(load_clip(record, clips).frames_THWC, image_size)
    return (now(torch.device("cpu")) - started) * len(frames_THWC) / length


def time_fusing_and_writing(features: list[torch.Tensor], folder: Path) -> tuple[float, float]:
    """Seconds to bring both directions to the student's grid and fuse them; and to write them."""
    device = features[0].device
    started = now(device)
    grid = HEIGHT // 16, WIDTH // 16
    forward_THWC, backward_THWC = (resample_to_grid(maps, *grid) for maps in features)
    fused_THWG = to_float16(
        fuse_directions(forward_THWC, backward_THWC.flip(0), fusion="gram_flow", forward_weight=0.5)
    )
    fused = now(device)
    spec = ArraySpec(dtype="float16", shape=fused_THWG.shape, dimension_names=("t", "h", "w", "c"))
    settings = StoreSettings(kind="teacher", arrays={"features": spec}, values={})
    writer = StoreWriter.open(folder / "cache", settings, provenance={})
    with writer.shard("00000", source="benchmark") as shard:
        shard.add("clip", {"features": fused_THWG}, fingerprint=fingerprint_of("clip"))
        shard.commit()
    return fused - started, now(device) - fused


def split_of_time(
    ours: Ours, options: argparse.Namespace, folder: Path
) -> tuple[dict[str, float], float]:
    """Shares of one pass's time by step, and its FLOPs."""
    frames_THWC, mask_HW = make_frames(options.frames)
    with timed_parts(ours.model) as parts:
        if options.compile:
            ours.run(mask_HW)  # compiles again, with the clocks in place
            parts.clear()
        total, features = ours.run(mask_HW)
    # Compiled code hides its operations from the counter.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        ours.run(mask_HW)
    fusing, writing = (
        seconds * options.clips for seconds in time_fusing_and_writing(features, folder)
    )
    steps = {
        "decode and resize (in a thread beside the GPU)": options.clips
        * time_decoding(frames_THWC, options.image_size),
        **parts,
        "rest of tracking": total - sum(parts.values()),
        "align and fuse": fusing,
        "write (in a thread beside the GPU)": writing,
    }
    whole = sum(steps.values())
    shares = {name: seconds / whole for name, seconds in steps.items()}
    return shares, counter.get_total_flops()


def shares_of_rates(flops_per_second: float, options: argparse.Namespace) -> dict[str, float]:
    """Shares of the rate measured on a matrix product, and of the data sheet's if it is known."""
    device = torch.device(options.device)
    rate = matmul_flops_per_second(device, DTYPES[options.precision])
    shares = {"share_of_matmul_rate": round(flops_per_second / rate, 3)}
    gpu = local_gpu() if device.type == "cuda" else None
    if gpu is not None:
        peak = gpu.fp32_flops if options.precision == "fp32" else gpu.bf16_flops
        shares["share_of_peak"] = round(flops_per_second / peak, 3)
    return shares


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="sam2.1_hiera_l")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--frames-per-batch", type=int, default=1)
    parser.add_argument("--clips", type=int, default=1, help="tracked in lockstep on our side")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of both sides")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    options = parser.parse_args()
    if options.frames < 9:
        parser.error("--frames must be at least 9: fewer say nothing of a clip")
    device = torch.device(options.device)
    frames_THWC, mask_HW = make_frames(options.frames)
    plain = options.frames_per_batch == options.clips == 1 and not options.compile
    exact = options.precision == "fp32" and plain
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "weights.pt"
        random_checkpoint(options.architecture, options.image_size, checkpoint)
        common = (
            options.architecture,
            options.image_size,
            options.device,
            checkpoint,
            frames_THWC,
        )
        ours = Ours(
            *common,
            clips=options.clips,
            precision=options.precision,
            frames_per_batch=options.frames_per_batch,
            compile=options.compile,
        )
        sides: dict[str, Callable[..., Any]] = {
            "stock, twice": Stock(*common, precision=options.precision).run,
            "ours, both ways": ours.run,
        }
        # Seconds for a clip.
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        clips_of = dict(zip(sides, (1, options.clips), strict=True))
        added = dict.fromkeys(sides, 0)
        if device.type == "cuda" or options.compile:
            for run in sides.values():
                run(mask_HW)  # loads libraries, compiles
        largest = 0.0
        for _ in range(options.repeats):
            features = []
            for name, run in sides.items():
                held = held_bytes(device)
                reset_peak(device)
                taken, maps = run(mask_HW)
                added[name] = max(added[name], (peak_bytes(device) - held) >> 20)
                seconds[name].append(taken / clips_of[name])
                features.append(maps)
            for theirs, mine in zip(*features, strict=True):
                largest = max(largest, (theirs.float() - mine.float()).abs().max().item())
            if exact and largest > TOLERANCE:
                raise SystemExit(f"the features differ by {largest:.2e}, above {TOLERANCE:.0e}")
        split, flops = split_of_time(ours, options, folder)
    rows, rates = [], {}
    for name, times in seconds.items():
        median, (low, high) = median_and_spread([options.frames / taken for taken in times])
        rates[name] = round(median, 4)
        rows.append([name, f"{median:.3g}", f"{low:.3g} to {high:.3g}"])
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    ratio, spread = median_and_spread(ratios)
    split_rows = [[name, f"{100 * share:.1f}%"] for name, share in split.items()]
    flops_per_second = flops / options.clips / min(seconds["ours, both ways"])
    finish(
        "stage_one",
        f"{table(['side', 'frames/s, both ways', 'spread'], rows)}\n\n"
        f"{table(['part of ours', 'time'], split_rows)}",
        {
            "ratio": round(ratio, 3),
            "target": TARGETS[device.type],
            "spread": [round(value, 3) for value in spread],
            "largest_difference": largest,
            "frames_per_second": rates,
            **shares_of_rates(flops_per_second, options),
            "added_mib": added,
            "split": {name: round(share, 4) for name, share in split.items()},
            "machine": machine(device),
            "settings": {k: str(v) for k, v in vars(options).items() if k != "write"},
        },
        options.write,
    )


if __name__ == "__main__":
    main()
