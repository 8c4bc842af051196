"""Torch dtypes by their names in a configuration."""

from collections.abc import Mapping

import torch

from stages.config import Precision

DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
