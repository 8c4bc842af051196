"""What each form of the teacher takes on disk, how exact it is, and how fast it is made and read.

    python tests/benchmarks/cache_size.py --clips folder/of/clips --num-clips 1

Features come from tracked clips and from synthetic fields; both forms are written by the store's
own writer. Exactness is the divergence KL(exact || stored) of the softmax over each token's window,
in nats and float64; exact is the Gram flow of the features before anything was rounded.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import finish, machine, median_and_spread, table
from sam2_sides import random_checkpoint
from teacher_samples import FIELDS, GRID, RADIUS, clips, field, track
from torch import Tensor

from cache_schema import ArraySpec, StoreReader, StoreSettings, StoreWriter
from stages.local_gram_flow import local_gram_flow, neighbour_mask
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.tracker import Tracker
from stages.teacher_store.features import decode_features, encode_features, feature_arrays_spec
from stages.teacher_store.gram_flow import (
    compute_gram_flow,
    decode_gram_flow,
    encode_gram_flow,
    flow_arrays_spec,
)
from tests.fingerprints import fingerprint_of

# Legend: T frame, H W token grid, G fused channel, P frame pair, K neighbour.

Arrays = dict[str, np.ndarray]
TARGETS = {"features int8": 34.0, "gram_flow float16": 4.2}
"""MB a clip, at a mean divergence below `KL_TARGET`."""
KL_TARGET = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One way to store the teacher of a clip."""

    name: str
    spec: dict[str, ArraySpec]
    encode: Callable[[Tensor], Arrays]
    """From fused_THWG, or from flow_PHWK where `of_flow`."""
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    of_flow: bool


def forms(shape: tuple[int, ...]) -> list[Form]:
    """All forms, for features of shape [T, H, W, G]."""
    T, H, W, G = shape
    return [
        Form(
            name=f"features {dtype}",
            spec=feature_arrays_spec((T, H, W, G), dtype),
            encode=partial(encode_features, dtype=dtype),
            decode=decode_features,
            of_flow=False,
        )
        for dtype in ("float16", "int8")
    ] + [
        Form(
            name=f"gram_flow {dtype}",
            spec=flow_arrays_spec(T - 1, H, W, RADIUS, dtype),
            encode=partial(encode_gram_flow, dtype=dtype),
            decode=decode_gram_flow,
            of_flow=True,
        )
        for dtype in ("float16", "uint8")
    ]


def log_probability(flow_PHWK: Tensor, temperature: float) -> Tensor:
    """Of each neighbour inside the grid, float64; zero for those outside."""
    inside_HWK = neighbour_mask(GRID[0], GRID[1], RADIUS)
    logits_PHWK = (flow_PHWK.double() / temperature).masked_fill(~inside_HWK, -torch.inf)
    return torch.log_softmax(logits_PHWK, dim=-1).masked_fill(~inside_HWK, 0.0)


def divergence(log_exact_PHWK: Tensor, log_stored_PHWK: Tensor) -> Tensor:
    """KL of each token's window, float64 [P, H, W]."""
    # Outside the grid both hold 0, and so does the difference.
    return (log_exact_PHWK.exp() * (log_exact_PHWK - log_stored_PHWK)).sum(-1)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


@dataclass(frozen=True, slots=True)
class Measured:
    """One form of one clip."""

    megabytes: float
    raw_megabytes: float
    mean: float
    largest: float
    encode_ms: float
    write_ms: float
    read_ms: float
    decode_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A clip's features, and what follows from them."""

    name: str
    fused_THWG: Tensor
    flow_PHWK: Tensor
    """As it is stored: of features rounded to float16."""
    log_exact_PHWK: Tensor
    """Of features before rounding."""

    @classmethod
    def of(cls, name: str, fused_THWG: Tensor, temperature: float) -> "Case":
        """Compute them."""
        kept = {k: torch.from_numpy(a) for k, a in encode_features(fused_THWG, "float16").items()}
        flow_PHWK = compute_gram_flow(decode_features(kept), radius=RADIUS, token_grid=GRID)
        exact_PHWK = local_gram_flow(fused_THWG.double()[None], RADIUS)[0]
        return cls(
            name=f"{name} ({spread_of(flow_PHWK)})",
            fused_THWG=fused_THWG,
            flow_PHWK=flow_PHWK,
            log_exact_PHWK=log_probability(exact_PHWK, temperature),
        )


def measure(form: Form, case: Case, folder: Path, options: argparse.Namespace) -> Measured:
    """Write the clip in that form, read it back, and compare."""
    values = case.flow_PHWK if form.of_flow else case.fused_THWG
    settings = StoreSettings(
        kind="gram_flow" if form.of_flow else "teacher", arrays=form.spec, values={}
    )
    writer = StoreWriter.open(folder, settings, provenance={})
    seconds: dict[str, list[float]] = {name: [] for name in ("encode", "write", "read", "decode")}
    with writer.shard("00000", source="benchmark") as shard:
        for repeat in range(options.repeats):
            encoding, arrays = timed(lambda: form.encode(values))
            key = f"clip-{repeat}"
            writing, _ = timed(partial(shard.add, key, arrays, fingerprint=fingerprint_of(key)))
            seconds["encode"].append(encoding)
            seconds["write"].append(writing)
        shard.commit()
    reader = StoreReader(writer.path)
    for key in reader.keys:
        reading, found = timed(partial(reader.read, key))
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        decoding, decoded = timed(partial(form.decode, tensors))
        seconds["read"].append(reading)
        seconds["decode"].append(decoding)
    flow_PHWK = decoded if form.of_flow else local_gram_flow(decoded[None], RADIUS)[0]
    kl_PHW = divergence(case.log_exact_PHWK, log_probability(flow_PHWK, options.temperature))
    ms = {name: 1e3 * median_and_spread(taken)[0] for name, taken in seconds.items()}
    return Measured(
        megabytes=reader.num_bytes / len(reader) / 1e6,
        raw_megabytes=sum(array.nbytes for array in found.values()) / 1e6,
        mean=kl_PHW.mean().item(),
        largest=kl_PHW.max().item(),
        encode_ms=ms["encode"],
        write_ms=ms["write"],
        read_ms=ms["read"],
        decode_ms=ms["decode"],
    )


def tracked(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Features of clips; they are kept in --activations, and not tracked again from there."""
    kept = options.activations or folder
    kept.mkdir(parents=True, exist_ok=True)
    weights = options.checkpoint
    tracker = None
    for name, frames_THWC, prompt in clips(options.clips, options.num_clips):
        of = "random" if weights is None else weights.stem
        file = (
            kept / f"{name.replace('/', '_')}-{options.architecture}-{options.image_size}-{of}.npy"
        )
        if not file.exists():
            if tracker is None:
                checkpoint = weights or folder / "weights.pt"
                if weights is None:
                    random_checkpoint(options.architecture, options.image_size, checkpoint)
                model = build_sam2(
                    options.architecture,
                    checkpoint,
                    image_size=options.image_size,
                    device=options.device,
                )
                tracker = Tracker(model, precision="fp32")
            np.save(file, track(tracker, frames_THWC, prompt).cpu().numpy())
        yield f"clip {name}", torch.from_numpy(np.load(file))


def spread_of(flow_PHWK: Tensor) -> str:
    """How similar neighbours are: the middle 98%, and the median range of a window."""
    inside_HWK = neighbour_mask(GRID[0], GRID[1], RADIUS)
    low, high = np.quantile(flow_PHWK[:, inside_HWK].numpy(), (0.01, 0.99))
    range_PHW = flow_PHWK.masked_fill(~inside_HWK, -torch.inf).amax(-1)
    range_PHW = range_PHW - flow_PHWK.masked_fill(~inside_HWK, torch.inf).amin(-1)
    return f"{low:.2f} to {high:.2f}, {range_PHW.median().item():.2f}"


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, help="dataset; default: figures drawn as in the demo")
    parser.add_argument("--num-clips", type=int, default=1)
    parser.add_argument("--architecture", default="sam2.1_hiera_t")
    parser.add_argument("--checkpoint", type=Path, help="default: random weights")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--activations", type=Path, help="folder that keeps what was tracked")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")
    options = parser.parse_args()
    found: dict[str, dict[str, Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = ((f"field {name}", field(name)) for name in FIELDS)
        for name, fused_THWG in chain(tracked(options, folder), fields):
            case = Case.of(name, fused_THWG, options.temperature)
            with tempfile.TemporaryDirectory(dir=folder) as stores:
                found[case.name] = {
                    form.name: measure(form, case, Path(stores), options)
                    for form in forms(tuple(fused_THWG.shape))
                }
    report(found, options)


def report(found: dict[str, dict[str, Measured]], options: argparse.Namespace) -> None:
    """Print tables of sizes, exactness and speed."""
    of_clips = [case for case in found if case.startswith("clip ")]
    rows, speeds = [], []
    for case, measured in found.items():
        for form, one in measured.items():
            share = f"{100 * one.megabytes / one.raw_megabytes:.0f}%"
            size = [f"{one.megabytes:.3f}", share]
            rows.append([case, form, *size, f"{one.mean:.1e}", f"{one.largest:.1e}"])
    for form in next(iter(found.values())):
        row = [form]
        for part in ("encode_ms", "write_ms", "read_ms", "decode_ms"):
            taken = [getattr(measured[form], part) for measured in found.values()]
            median, (low, high) = median_and_spread(taken)
            row.append(f"{median:.0f} ({low:.0f} to {high:.0f})")
        speeds.append(row)
    header = ["features (similarities, window)", "form", "MB a clip", "of raw", "KL mean", "KL max"]
    sizes = table(header, rows)
    speed = table(["form", "encode, ms", "write, ms", "read, ms", "decode, ms"], speeds)
    worst = {
        form: {
            "mb_of_clips": round(max(found[case][form].megabytes for case in of_clips), 3),
            "mb": round(max(measured[form].megabytes for measured in found.values()), 3),
            "kl_mean": float(f"{max(measured[form].mean for measured in found.values()):.2e}"),
        }
        for form in next(iter(found.values()))
    }
    flow = [measured["gram_flow float16"].megabytes for measured in found.values()]
    finish(
        "cache_size",
        f"{sizes}\n\n{speed}",
        {
            "value": worst["gram_flow float16"]["mb_of_clips"],
            "target": TARGETS["gram_flow float16"],
            "spread": [round(min(flow), 3), round(max(flow), 3)],
            "targets_mb": TARGETS,
            "target_kl_mean": KL_TARGET,
            "largest": worst,
            "machine": machine(torch.device(options.device)),
            "settings": {
                "clips": "drawn" if options.clips is None else str(options.num_clips),
                "architecture": options.architecture,
                "weights": "random" if options.checkpoint is None else options.checkpoint.name,
                "image_size": str(options.image_size),
                "temperature": str(options.temperature),
                "repeats": str(options.repeats),
            },
        },
        options.write,
    )


if __name__ == "__main__":
    main()
