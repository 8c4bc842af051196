"""The parts of the check, most worth first: what is run, at full size and at a tiny one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Size = Literal["tiny", "full"]

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One command, whose last line of output is a JSON object."""

    name: str
    script: str
    """A file of `tests/benchmarks`."""
    arguments: Mapping[Size, str]

    def command(self, size: Size) -> list[str]:
        """Return the arguments of Python."""
        return [str(BENCHMARKS / self.script), *self.arguments[size].split()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Measurements that answer one question, with a limit of time together."""

    name: str
    title: str
    minutes: float
    """Limit of all measurements of the part."""
    measurements: tuple[Measurement, ...]
    columns: Mapping[str, tuple[str, ...]]
    """What the table shows of a result: the path of a value by heading."""
    without_gpu: str
    """What a run without a GPU leaves out."""


def _measurements(
    script: str, shared: Mapping[Size, str], variants: Mapping[str, str]
) -> tuple[Measurement, ...]:
    """Return one measurement per variant, with the same extra arguments at both sizes."""
    return tuple(
        Measurement(
            name=name,
            script=script,
            arguments={size: f"{text} {variant}".strip() for size, text in shared.items()},
        )
        for name, variant in variants.items()
    )


_TINY_SAM2 = "--sam2 sam2.1_hiera_t --image-size 128"
_TINY_MODEL = f"--model demo --layers 4 --frames 9 --height 64 --width 96 {_TINY_SAM2} --repeats 1"
_FULL_MODEL = (
    "--model cogvideox-5b --layers 42 --frames 49 --height 480 --width 720 "
    "--sam2 sam2.1_hiera_l --image-size 1024 --repeats 3"
)
_MODEL: Mapping[Size, str] = {"tiny": _TINY_MODEL, "full": _FULL_MODEL}
_STAGE_ONE: Mapping[Size, str] = {
    "tiny": "--architecture sam2.1_hiera_t --image-size 128 --frames 9 --repeats 1",
    "full": "--architecture sam2.1_hiera_l --image-size 1024 --frames 49 --repeats 3",
}
_TRAIN_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "s/step": ("seconds_per_step",),
    "peak, MiB": ("peak_mib",),
    "of the dry run's": ("ratio",),
    "held": ("measured_mib", "held between steps"),
    "dry run": ("estimated_mib", "held between steps"),
    "passes": ("measured_mib", "added by the passes"),
    "dry run, passes": ("estimated_mib", "added by the passes"),
    "libraries": ("measured_mib", "libraries"),
}
_RESIDENT = "memory is resident memory, which the dry run does not describe"

PARTS: tuple[Part, ...] = (
    Part(
        name="tests",
        title="tests marked gpu",
        minutes=6,
        measurements=(
            Measurement(
                name="pytest -m gpu",
                script="gpu_check/marked_tests.py",
                arguments={"tiny": "", "full": ""},
            ),
        ),
        columns={
            "passed": ("passed",),
            "failed": ("failed",),
            "skipped": ("skipped",),
        },
        without_gpu="every test is skipped",
    ),
    Part(
        name="stage_one",
        title="stage one against sam2's own predictor",
        minutes=12,
        measurements=(
            *_measurements(
                "stage_one.py",
                _STAGE_ONE,
                {
                    "8 frames a batch": "--precision bf16 --frames-per-batch 8",
                    "4 clips in lockstep": "--precision bf16 --frames-per-batch 8 --clips 4",
                    "compiled": "--precision bf16 --frames-per-batch 8 --compile",
                    "1 frame a batch": "--precision bf16",
                    "float32": "--precision fp32",
                },
            ),
        ),
        columns={
            "stock, frames/s": ("frames_per_second", "stock, twice"),
            "ours, frames/s": ("frames_per_second", "ours, both ways"),
            "times as fast": ("ratio",),
            "of the matmul rate": ("share_of_matmul_rate",),
            "of the data sheet's": ("share_of_peak",),
            "image encoder": ("split", "image encoder"),
            "memory attention": ("split", "memory attention"),
            "ours adds, MiB": ("added_mib", "ours, both ways"),
            "stock adds": ("added_mib", "stock, twice"),
        },
        without_gpu="the share of a data sheet's rate is not told; memory is resident memory",
    ),
    Part(
        name="step",
        title="training step with no teacher, a cached and an online one",
        minutes=12,
        measurements=_measurements(
            "step_overhead.py",
            _MODEL,
            {"features": "--form features", "Gram flow": "--form gram_flow"},
        ),
        columns={
            "none, s": ("seconds_per_step", "none"),
            "cached": ("ratio",),
            "online": ("ratio_online",),
            "peak none, MiB": ("peak_mib", "none"),
            "cached, MiB": ("peak_mib", "cached"),
            "online, MiB": ("peak_mib", "online"),
        },
        without_gpu="peak memory is resident memory",
    ),
    Part(
        name="memory",
        title="memory of training against the dry run",
        minutes=5,
        measurements=_measurements("train_memory.py", _MODEL, {"ZeRO 2": "--zero-stage 2"}),
        columns=_TRAIN_COLUMNS,
        without_gpu=_RESIDENT,
    ),
    Part(
        name="gram_flow",
        title="Local Gram Flow kernels against a copy",
        minutes=5,
        measurements=_measurements(
            "local_gram_flow.py",
            {
                "tiny": "--frames 3 --height 8 --width 12 --channels 32 --repeats 1",
                "full": "--frames 13 --height 30 --width 45 --channels 256 --repeats 30",
            },
            {"float32": "--dtype float32", "bfloat16": "--dtype bfloat16"},
        ),
        columns={
            "unfold over ours": ("ratio",),
            "largest error": ("largest_error",),
            **{
                f"{side}, ms": ("milliseconds", side)
                for side in ("ours", "triton", "compiled", "unfold")
            },
            **{
                f"{side}, of a copy": ("share_of_copy", side)
                for side in ("ours", "triton", "compiled")
            },
        },
        without_gpu="the Triton and the compiled kernel are left out",
    ),
    Part(
        name="zero",
        title="ZeRO stages and CPU offload",
        minutes=12,
        measurements=_measurements(
            "train_memory.py",
            _MODEL,
            {
                "ZeRO 1": "--zero-stage 1",
                "ZeRO 3": "--zero-stage 3",
                "ZeRO 2, optimizer on the host": "--zero-stage 2 --offload optimizer",
                "ZeRO 3, all on the host": "--zero-stage 3 --offload all",
            },
        ),
        columns=_TRAIN_COLUMNS,
        without_gpu=f"nothing is offloaded; {_RESIDENT}",
    ),
    Part(
        name="adamw8bit",
        title="AdamW with moments in 8 bits",
        minutes=5,
        measurements=_measurements(
            "train_memory.py", _MODEL, {"ZeRO 2": "--zero-stage 2 --optimizer adamw8bit"}
        ),
        columns=_TRAIN_COLUMNS,
        without_gpu=_RESIDENT,
    ),
    Part(
        name="models",
        title="frozen models, and the VAE's decoder in tiles",
        minutes=8,
        measurements=(
            *_measurements(
                "frozen_models.py",
                {
                    "tiny": _TINY_MODEL.replace("64 --width 96", "256 --width 384"),
                    "full": _FULL_MODEL,
                },
                {
                    "VAE decoder, tiles": "--part decode --tiling",
                    "VAE decoder, whole": "--part decode",
                },
            ),
            *_measurements(
                "frozen_models.py",
                _MODEL,
                {
                    "VAE encoder": "--part latents",
                    "SAM2": "--part tracker",
                    "text encoder": "--part text",
                },
            ),
            Measurement(
                name="SAM2, where frames wait",
                script="stage_one_memory.py",
                arguments={
                    "tiny": "--architecture sam2.1_hiera_t --image-size 128 --frames 9",
                    "full": "--architecture sam2.1_hiera_l --image-size 1024 --frames 49",
                },
            ),
        ),
        columns={
            "s/clip": ("seconds",),
            "peak, MiB": ("peak_mib",),
            "weights": ("measured_mib", "weights"),
            "dry run": ("estimated_mib", "weights"),
            "working": ("measured_mib", "working"),
            "dry run, working": ("estimated_mib", "working"),
        },
        without_gpu=_RESIDENT,
    ),
    Part(
        name="evidence",
        title="training losses compared; killed at the limit, it goes on in the next run",
        minutes=60,
        measurements=(
            Measurement(
                name="structure error",
                script="evidence/__main__.py",
                arguments={
                    "tiny": "--size smoke --out build/evidence-smoke",
                    "full": "--size gpu --out build/evidence-gpu",
                },
            ),
        ),
        columns={"runs": ("runs",), "failed": ("failed",), "report": ("report",)},
        without_gpu="two arms of two steps, which say nothing",
    ),
)
