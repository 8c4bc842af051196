"""Whether torch's attention can compute in bfloat16 on this processor."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


def _fails() -> bool:
    tokens_BHND = torch.zeros(1, 1, 64, 16, dtype=torch.bfloat16)
    try:
        scaled_dot_product_attention(tokens_BHND, tokens_BHND, tokens_BHND)
    except RuntimeError as error:
        return "pack_vnni2" in str(error)
    return False


NEEDS_BFLOAT16_ATTENTION = pytest.mark.skipif(
    _fails(),
    reason="torch's attention fails in bfloat16 on processors with AMX if ATEN_CPU_CAPABILITY is "
    "default (pack_vnni2)",
)
