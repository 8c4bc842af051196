"""Settings of the stored Gram flow, and the dtypes of stored features and Gram flows."""

from typing import Literal

from pydantic import Field

from stages.config import Section

FeatureDtype = Literal["float16", "int8"]
"""Storage of fused features: float16 values, or int8 values with a scale per token."""

FlowDtype = Literal["float16", "uint8"]
"""Storage of a Gram flow: float16 values, or uint8 codes with a minimum and a step per token."""


StoredPairs = Literal["forward", "crossed"]
"""Similarities that a store holds; see `GramFlowConfig.pairs`."""


class GramFlowConfig(Section):
    """Gram flow of the teacher's features for one window: a fraction of the features' size."""

    radius: int = Field(default=3, ge=1)
    """Radius of the stored window in tokens; training may use this or a smaller one. 3 gives
    7x7 tokens."""
    pairs: StoredPairs = "forward"
    """forward: each map to the next, from fused features; supports train.lgf.pairs=forward,
    backward and both. crossed: each map to the next from the backward track, and to the previous
    one from the forward track; needed by train.lgf.pairs=crossed, twice the size."""
    dtype: FlowDtype = "float16"
    """float16: compressed, exact to 2^-11; 2 to 4 MB per clip of 49 frames and 30x45 tokens, for
    temperatures of 0.07 and above. uint8: 3.4 MB, faster to read, less exact where a window's
    similarities span more than 0.4."""
