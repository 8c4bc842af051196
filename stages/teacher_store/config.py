"""Settings of the Gram flow that is cached, and the names of both forms' number formats."""

from typing import Literal

from pydantic import Field

from stages.config import Section

FeatureDtype = Literal["float16", "int8"]
"""How fused features are stored: as they are, or as bytes with a scale for each token."""

FlowDtype = Literal["float16", "uint8"]
"""How a Gram flow is stored: as it is, or as bytes with the lowest value and the step of each
token's window."""


StoredPairs = Literal["forward", "crossed"]
"""Which similarities a store holds; `GramFlowConfig.pairs`."""


class GramFlowConfig(Section):
    """The Gram flow of the teacher's features: a fraction of their size, for one window."""

    radius: int = Field(default=3, ge=1)
    """Half the window that is stored; training may use this one or a smaller one. 3 gives
    7x7 tokens."""
    pairs: StoredPairs = "forward"
    """forward: each map to the next, from fused features, which serves train.lgf.pairs=forward,
    backward and both. crossed, of twice the size: each map to the next from the backward track and
    to the one before from the forward track, for train.lgf.pairs=crossed."""
    dtype: FlowDtype = "float16"
    """float16, compressed and exact to 2^-11: 2 to 4 MB a clip of 49 frames and 30x45 tokens, for
    temperatures of 0.07 and more. Or uint8, 3.4 MB: faster to read, and less exact where a window's
    similarities span more than 0.4."""
