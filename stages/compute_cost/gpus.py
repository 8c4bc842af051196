"""GPUs people train on, and what their makers say of them; estimates and the run's own log ask."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

GIB = 2**30
_TERA = 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU, by its maker's data sheet."""

    name: str
    memory_bytes: int
    """That a program can have; drivers and the context keep some of what is printed on the box."""
    bf16_flops: float
    """Operations per second of dense products in bf16, gathered in float32."""
    fp32_flops: float
    """The same in float32, without tensor cores."""


def _gpu(name: str, memory_gib: float, bf16_tflops: float, fp32_tflops: float) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=int(memory_gib * GIB),
        bf16_flops=bf16_tflops * _TERA,
        fp32_flops=fp32_tflops * _TERA,
    )


GPUS: Mapping[str, Gpu] = {
    "b200": _gpu("NVIDIA B200", 178, 2250, 75),
    "h200": _gpu("NVIDIA H200", 139, 989, 67),
    "h100": _gpu("NVIDIA H100 80GB", 79, 989, 67),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 79, 756, 51),
    "a100-80gb": _gpu("NVIDIA A100 80GB", 79, 312, 19.5),
    "a100-40gb": _gpu("NVIDIA A100 40GB", 39, 312, 19.5),
    "rtx-pro-6000": _gpu("NVIDIA RTX PRO 6000 Blackwell", 94, 503, 126),
    "l40s": _gpu("NVIDIA L40S", 44, 362, 91.6),
    "a6000": _gpu("NVIDIA RTX A6000", 47, 155, 38.7),
    "a40": _gpu("NVIDIA A40", 44, 150, 37.4),
    "rtx-5090": _gpu("NVIDIA GeForce RTX 5090", 31, 210, 105),
    "rtx-4090": _gpu("NVIDIA GeForce RTX 4090", 23.5, 165, 82.6),
    "rtx-3090": _gpu("NVIDIA GeForce RTX 3090", 23.5, 71, 35.6),
}
"""By the name that `--gpu` takes. Dense rates: data sheets often print twice as much, for sparse
matrices; GeForce cards gather in float32 at half their rate."""

_MARKS: tuple[tuple[str, str], ...] = (
    (r"B200", "b200"),
    (r"H200", "h200"),
    (r"H100.*PCIE", "h100-pcie"),
    (r"H100", "h100"),
    (r"A100.*80GB", "a100-80gb"),
    (r"A100", "a100-40gb"),
    (r"RTX PRO 6000", "rtx-pro-6000"),
    (r"L40S", "l40s"),
    (r"RTX A6000", "a6000"),
    (r"\bA40\b", "a40"),
    (r"RTX 5090\b(?! LAPTOP| D)", "rtx-5090"),
    (r"RTX 4090\b(?! LAPTOP| D)", "rtx-4090"),
    (r"RTX 3090\b(?! TI)", "rtx-3090"),
)
"""What in a device's own name tells which it is; the first that fits decides."""


def gpu_named(name: str) -> Gpu:
    """Return the GPU of that short name.

    Raises:
        ValueError: There is none; names those there are.
    """
    for known, gpu in GPUS.items():
        if _bare(known) == _bare(name):
            return gpu
    raise ValueError(f"no GPU is named {name!r}; there are {', '.join(GPUS)}")


def _bare(name: str) -> str:
    """A name without case and what is written between its words: rtx-4090 is RTX4090."""
    return re.sub(r"[-_ ]", "", name.lower())


def gpu_of_device(name: str) -> Gpu | None:
    """Return the GPU that calls itself `name`, as torch tells it; None if it is not in the list."""
    for mark, short in _MARKS:
        if re.search(mark, name.upper()):
            return GPUS[short]
    return None


def gpu_here() -> Gpu | None:
    """Return this machine's first GPU; None where there is none, or none of the list."""
    if not torch.cuda.is_available():
        return None
    return gpu_of_device(torch.cuda.get_device_name())
