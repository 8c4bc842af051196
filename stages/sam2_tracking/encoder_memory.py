"""Lower peak memory of SAM2's image encoder, set up in place; the outputs that are read stay equal.

Two things take most of it: the first stages' blocks, whose activations are up to eleven times their
input, and position encodings of levels on which nothing is tracked.
"""

# Legend: B frame of a batch, H W grid of a block's input or of a level, C channel.

from functools import partial
from typing import Any

import torch

_TOKENS_PER_BAND = 8192
"""Enough for matrix products of full size: with fewer, they are slower and can round otherwise."""


def reduce_encoder_memory(model: Any) -> None:
    """Lower the peak memory of a SAM2Base's image encoder in place.

    On a CPU, blocks with windowed attention run on some rows of windows at a time, and position
    encodings are computed for the level that SAM2 tracks on alone.
    """
    encoder = model.image_encoder
    for block in encoder.trunk.blocks:
        if block.window_size > 0:
            block.forward = partial(_forward_in_bands, block)
    encoder.neck.position_encoding = _PositionsOfOneLevel(
        encoder.neck.position_encoding, side=model.sam_image_embedding_size
    )


def _forward_in_bands(block: Any, x_BHWC: torch.Tensor) -> torch.Tensor:
    """Apply sam2's MultiScaleBlock with windowed attention, in which windows are independent.

    Other devices run many windows faster at once, and compiled code keeps fewer activations.
    """
    forward = partial(type(block).forward, block)
    num_frames, height, width, _ = x_BHWC.shape
    windows = _TOKENS_PER_BAND // (num_frames * width * block.window_size)
    rows = max(1, windows) * block.window_size
    if rows >= height or x_BHWC.device.type != "cpu" or torch.compiler.is_compiling():
        return forward(x_BHWC)
    first_BHWC = forward(x_BHWC[:, :rows])
    stride = rows // first_BHWC.shape[1]
    output_BHWC = first_BHWC.new_empty(num_frames, height // stride, *first_BHWC.shape[2:])
    output_BHWC[:, : rows // stride] = first_BHWC
    for start in range(rows, height, rows):
        band_BHWC = forward(x_BHWC[:, start : start + rows])
        output_BHWC[:, start // stride : (start + rows) // stride] = band_BHWC
    return output_BHWC


class _PositionsOfOneLevel(torch.nn.Module):
    """Position encoding of the level with the given side; for others, zeros without storage."""

    def __init__(self, positions: torch.nn.Module, *, side: int) -> None:
        super().__init__()
        self.positions = positions
        self.side = side

    def forward(self, level_BCHW: torch.Tensor) -> torch.Tensor:
        if level_BCHW.shape[-1] == self.side:
            return self.positions(level_BCHW)
        return level_BCHW.new_zeros(()).expand(level_BCHW.shape)
