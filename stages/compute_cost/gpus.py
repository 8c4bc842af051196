"""Memory and peak FLOP/s of common training GPUs, from the vendor's data sheets."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

GIB = 2**30
_TERA = 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Data-sheet values of one GPU model."""

    name: str
    memory_bytes: int
    """Memory available to a program; driver and context reserve part of the nominal size."""
    bf16_flops: float
    """Peak FLOP/s of dense bf16 products with float32 accumulation."""
    fp32_flops: float
    """Peak FLOP/s in float32, without tensor cores."""


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
"""GPUs by the name that `--gpu` accepts. Peaks are dense; data sheets often print twice as much,
for sparse matrices. GeForce cards accumulate in float32 at half their rate."""

_DEVICE_NAME_PATTERNS: tuple[tuple[str, str], ...] = (
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
"""Regex on the device name -> name in `GPUS`; the first match wins."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU with this name in `GPUS`.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    for known, gpu in GPUS.items():
        if _normalise(known) == _normalise(name):
            return gpu
    raise ValueError(f"unknown GPU {name!r}; known GPUs are {', '.join(GPUS)}")


def _normalise(name: str) -> str:
    """Lower-case a name and remove separators, so that rtx-4090 equals RTX4090."""
    return re.sub(r"[-_ ]", "", name.lower())


def gpu_of_device(name: str) -> Gpu | None:
    """Return the GPU for a device name as torch reports it; None if it is unknown."""
    for pattern, gpu_id in _DEVICE_NAME_PATTERNS:
        if re.search(pattern, name.upper()):
            return GPUS[gpu_id]
    return None


def local_gpu() -> Gpu | None:
    """Return this machine's first GPU; None if there is none or it is not in `GPUS`."""
    if not torch.cuda.is_available():
        return None
    return gpu_of_device(torch.cuda.get_device_name())
