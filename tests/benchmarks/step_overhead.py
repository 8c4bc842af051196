"""What the auxiliary loss costs a training step: none, the cached teacher, SAM2 beside the model.

    python tests/benchmarks/step_overhead.py

One transformer of CogVideoX-5B's width with random weights and low-rank adapters makes the same
steps three ways, in turn: with the diffusion loss alone; with Local Gram Flow from a cache that a
worker process reads; with the same loss from a tracker in the same process, which tracks the clip
both ways in every step. A step is everything from asking for the batch to the changed weights.
Peak memory is of processes of their own, one for each side, over one step after another. On a GPU
the model is the full one; `--layers` and `--frames` make it what a CPU can bear.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from report import (
    finish,
    machine,
    median_and_spread,
    now,
    peak_bytes,
    reset_peak,
    table,
)
from sam2_sides import make_frames, random_checkpoint
from torch import Tensor

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.clips import ClipsConfig
from stages.config import Precision
from stages.demo.build import PRETRAINED
from stages.students.cogvideox.official_models import NAMES
from stages.students.official_models import official_configs
from stages.students.registry import read_configs
from stages.students.student import StudentConfigs
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch, CachedSamples
from stages.train_student.data.loader import BatchLoader
from stages.train_student.data.order import micro_batches
from stages.train_student.data.stores import Buckets, join_buckets
from stages.train_student.model.lora import add_adapters
from stages.train_student.model.student import Student
from stages.train_student.objectives.build import build_heads, build_objectives, kinds_needed
from stages.train_student.objectives.config import ObjectiveName
from stages.train_student.step import TrainingStep
from tests.fingerprints import fingerprint_of

NONE, CACHED, ONLINE = "none", "cached", "online"
SIDES = (NONE, CACHED, ONLINE)
TARGET = 1.02
CHANNELS = 512
NUM_CLIPS = 2
SMALL: dict[str, int | str] = {
    "layers": 4,
    "frames": 17,
    "height": 240,
    "width": 368,
    "sam2": "sam2.1_hiera_t",
    "image_size": 512,
}
FULL: dict[str, int | str] = {
    "layers": 42,
    "frames": 49,
    "height": 480,
    "width": 720,
    "sam2": "sam2.1_hiera_l",
    "image_size": 1024,
}


def facts_of(options: argparse.Namespace) -> StudentConfigs:
    """The model's, with as many layers as asked for."""
    demo = options.model == "demo"
    configs = read_configs(PRETRAINED / "cogvideox") if demo else official_configs(options.model)
    return replace(configs, transformer=configs.transformer | {"num_layers": options.layers})


def settings(options: argparse.Namespace, objectives: tuple[ObjectiveName, ...]) -> TrainConfig:
    """Training as the preset has it, at the same share of the depth."""
    return TrainConfig(
        objectives=objectives,
        block=int(0.6 * options.layers),
        batch_size=1,
        teacher_form=options.form,
    )


def size_of(options: argparse.Namespace) -> ClipsConfig:
    """Length, height and width of the clips."""
    return ClipsConfig(
        path=Path("unused"),
        num_frames=options.frames,
        height=options.height,
        width=options.width,
    )


def make_cache(folder: Path, configs: StudentConfigs, options: argparse.Namespace) -> None:
    """Stores of synthetic clips: text, latents, and the teacher in the form asked for."""
    # Imported here: it brings in SAM2, which the cached sides' processes must not hold.
    from stages.teacher_store.features import encode_features, feature_arrays_spec
    from stages.teacher_store.gram_flow import compute_gram_flow, encode_gram_flow, flow_arrays_spec

    size = size_of(options)
    frames, grid = options.frames, size.token_grid
    latents = ArraySpec(
        dtype="float16",
        shape=(size.num_latent_frames, configs.latent_channels, *size.latent_size),
        dimension_names=("f", "c", "h", "w"),
    )
    text = (configs.transformer["max_text_seq_length"], configs.transformer["text_embed_dim"])
    valid = ArraySpec(dtype="uint8", shape=(frames,), dimension_names=("t",))
    if options.form == "features":
        kind, teacher = "teacher", feature_arrays_spec((frames, *grid, CHANNELS), "int8")
    else:
        kind, teacher = "gram_flow", flow_arrays_spec(frames - 1, *grid, 3, "float16")
    arrays = {
        "text": {"embeds": ArraySpec(dtype="float16", shape=text, dimension_names=("l", "d"))},
        "latents": {"mean": latents, "std": latents},
        kind: teacher | {"valid": valid},
    }
    random = np.random.default_rng(0)

    def clip(kind: str) -> dict[str, np.ndarray]:
        if kind in ("text", "latents"):
            return {
                name: random.standard_normal(spec.shape, np.float32).astype(spec.dtype)
                for name, spec in arrays[kind].items()
            }
        fused = torch.from_numpy(random.standard_normal((frames, *grid, CHANNELS), np.float32))
        fused = torch.nn.functional.normalize(fused, dim=-1)
        stored = (
            encode_features(fused, "int8")
            if kind == "teacher"
            else encode_gram_flow(
                compute_gram_flow(fused.half(), radius=3, token_grid=grid), "float16"
            )
        )
        return stored | {"valid": np.ones(frames, np.uint8)}

    for kind, spec in arrays.items():
        values: dict[str, Any] = {"parts": 2, "fusion": "gram_flow"} if kind == "teacher" else {}
        store = StoreSettings(kind=kind, arrays=spec, values=values)
        writer = StoreWriter.open(folder, store, provenance={})
        with writer.shard("00000", source="benchmark") as shard:
            for number in range(NUM_CLIPS):
                shard.add(
                    f"clip/{number}", clip(kind), fingerprint=fingerprint_of(f"clip/{number}")
                )
            shard.commit()


class OnlineTeacher:
    """SAM2 on the device: the features of a clip, tracked both ways when asked for."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from stages.sam2_tracking.build import build_sam2
        from stages.sam2_tracking.tracker import Tracker

        checkpoint = folder / f"{options.sam2}.pt"
        if not checkpoint.exists():
            random_checkpoint(options.sam2, options.image_size, checkpoint)
        model = build_sam2(
            options.sam2, checkpoint, image_size=options.image_size, device=options.device
        )
        precision: Precision = "bf16" if options.device.startswith("cuda") else "fp32"
        self._tracker = Tracker(model, precision=precision)
        self._frames_THWC, self._mask_HW = make_frames(options.frames)
        self._grid = size_of(options).token_grid

    def features(self) -> Tensor:
        """fused_THWG on the student's grid."""
        from teacher_samples import track

        from stages.clips import SubjectPrompt

        prompt = SubjectPrompt(mask_HW=self._mask_HW)
        return track(self._tracker, self._frames_THWC, prompt, grid=self._grid)


def batches_of(stores: Buckets, configs: StudentConfigs, device: torch.device) -> Iterator[Batch]:
    """Batches of one clip, read by a process."""
    samples = CachedSamples(stores.stores, configs, seed=0, batch_size=1)
    numbers = micro_batches(range(10**6), batch_size=1, micro_batch_size=1, rank=0, world_size=1)
    return BatchLoader(samples, numbers, workers=1, pin_memory=device.type == "cuda")


class Side:
    """One way of making a step."""

    def __init__(
        self,
        name: str,
        transformer: CogVideoXTransformer3DModel,
        configs: StudentConfigs,
        options: argparse.Namespace,
        folder: Path,
    ) -> None:
        config = settings(options, () if name == NONE else ("lgf",))
        self._device = torch.device(options.device)
        heads = build_heads(config, configs, None).to(self._device, transformer.dtype)
        self._student = Student(transformer, heads, config.block)
        self._trained = [p for p in self._student.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-6)
        self._training_step = TrainingStep(
            configs, build_objectives(config), device=self._device, dtype=transformer.dtype
        )
        self._teacher = OnlineTeacher(options, folder) if name == ONLINE else None
        kinds = kinds_needed(config) if name == CACHED else ()
        stores = join_buckets(folder, (size_of(options),), {}, kinds=kinds)
        self._batches = batches_of(stores, configs, self._device)

    def step(self) -> None:
        """From asking for the batch to the changed weights."""
        batch = next(self._batches).to(self._device)
        if self._teacher is not None:
            fused_BTHWG = self._teacher.features()[None].to(self._device)
            valid_BT = torch.ones(fused_BTHWG.shape[:2], dtype=torch.bool, device=self._device)
            batch = replace(batch, teacher={"features": fused_BTHWG}, teacher_valid_BT=valid_BT)
        losses = self._training_step(self._student, batch, 0)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def make_transformer(
    configs: StudentConfigs, options: argparse.Namespace
) -> CogVideoXTransformer3DModel:
    """Random weights on the device, adapters, gradient checkpointing."""
    torch.manual_seed(0)
    on_gpu = options.device.startswith("cuda")
    with torch.device(options.device):
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
    if on_gpu:
        transformer = transformer.to(torch.bfloat16)
    transformer.train()
    add_adapters(transformer, TrainConfig().lora)
    transformer.enable_gradient_checkpointing()
    return transformer


def peak_of_step(side: str, options: argparse.Namespace, folder: Path) -> int:
    """The most that this process, or the GPU, holds over a step of one side, after a first."""
    configs = facts_of(options)
    one = Side(side, make_transformer(configs, options), configs, options, folder)
    one.step()
    reset_peak(torch.device(options.device))
    one.step()
    return peak_bytes(torch.device(options.device))


def peak_in_own_process(side: str, folder: Path) -> int:
    """The same, measured where nothing else was."""
    answer = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], f"--side={side}", f"--folder={folder}"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(json.loads(answer.stdout.splitlines()[-1]))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each side's steps, taken in turn, the first of them another at each repeat."""
    configs = facts_of(options)
    transformer = make_transformer(configs, options)
    sides = {name: Side(name, transformer, configs, options, folder) for name in SIDES}
    device = torch.device(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for side in sides.values():
        side.step()
    for repeat in range(options.repeats):
        for place in range(len(SIDES)):
            name = SIDES[(repeat + place) % len(SIDES)]
            started = now(device)
            sides[name].step()
            seconds[name].append(now(device) - started)
    return seconds


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Models and the size of clips, with defaults by device."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--model", choices=[*NAMES, "demo"], default="cogvideox-5b")
    for name, value in (FULL if on_gpu else SMALL).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="add the report to this Markdown file")


def read_options() -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--form", choices=["features", "gram_flow"], default="features")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    options = read_options()
    if options.side:
        print(json.dumps(peak_of_step(options.side, options, options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_cache(folder, facts_of(options), options)
        # Before this process holds a model itself.
        memory = {name: peak_in_own_process(name, folder) / 2**20 for name in SIDES}
        seconds = compare(options, folder)
    spreads = {
        name: median_and_spread([a / b for a, b in zip(taken, seconds[NONE], strict=True)])
        for name, taken in seconds.items()
    }
    rows = []
    for name in SIDES:
        ratio, (low, high) = spreads[name]
        middle, (fast, slow) = median_and_spread(seconds[name])
        rows.append(
            [
                name,
                f"{middle:.2f} ({fast:.2f} to {slow:.2f})",
                f"{ratio:.3f} ({low:.3f} to {high:.3f})",
                f"{memory[name]:.0f}",
            ]
        )
    finish(
        "step_overhead",
        table(["teacher", "seconds a step", "against none", "peak, MiB"], rows),
        {
            "ratio": round(spreads[CACHED][0], 4),
            "target": TARGET,
            "spread": [round(value, 4) for value in spreads[CACHED][1]],
            "ratio_online": round(spreads[ONLINE][0], 4),
            "seconds_per_step": {
                name: round(median_and_spread(taken)[0], 3) for name, taken in seconds.items()
            },
            "peak_mib": {name: round(value) for name, value in memory.items()},
            "machine": machine(torch.device(options.device)),
            "settings": {
                name: str(value)
                for name, value in vars(options).items()
                if name not in ("write", "side", "device", "folder")
            },
        },
        options.write,
    )


if __name__ == "__main__":
    main()
