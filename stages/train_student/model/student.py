"""The student: a transformer with projector heads on the output of one block.

Legend: B clip, F latent frame, C channel, H W latent or token grid, J token in time, T map of an
objective, N token, L text token, D width, s side of a square of tokens.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from stages.students.registry import blocks_of


class BlockTap:
    """Captures the image tokens that a transformer block outputs, with their gradient.

    For blocks that return the video's hidden states, alone (Wan, LTX-Video) or before the text's
    (CogVideoX, HunyuanVideo, Mochi). The tap captures inside a `with` statement only, so that the
    recomputation of the block by gradient checkpointing in the backward pass is not captured::

        tap = BlockTap(transformer.transformer_blocks[25])
        with tap:
            velocity_BFCHW = transformer(...)[0]
        tokens_BND = tap.take()
    """

    def __init__(self, block: nn.Module) -> None:
        """Register a forward hook on `block`, which stays for the block's lifetime."""
        self._open = self._grad = False
        self._tokens_BND: Tensor | None = None
        block.register_forward_hook(self._capture, with_kwargs=True)

    def __enter__(self) -> Self:
        self._open, self._grad, self._tokens_BND = True, torch.is_grad_enabled(), None
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False

    def _capture(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._open:
            return
        inputs = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        grad_switched_off = self._grad and not torch.is_grad_enabled()
        if grad_switched_off and any(one.requires_grad for one in inputs):
            raise RuntimeError(
                "the tapped block runs under reentrant gradient checkpointing, so that its tokens "
                "carry no gradient; use torch.utils.checkpoint with use_reentrant=False, which "
                "diffusers' enable_gradient_checkpointing() does by default"
            )
        self._tokens_BND = output[0] if isinstance(output, tuple) else output

    def take(self) -> Tensor:
        """Return the tokens of the last pass and release them: tokens_BND, in the order t, h, w.

        Raises:
            RuntimeError: the block has not run inside the last `with` statement, or its tokens
                have been taken.
        """
        tokens_BND, self._tokens_BND = self._tokens_BND, None
        if tokens_BND is None:
            raise RuntimeError(
                "the tapped block has not run inside `with tap:` since its tokens were last taken; "
                "call the transformer there, once before each take()"
            )
        return tokens_BND


class Student(nn.Module):
    """Transformer and heads as one module with one forward pass, as DeepSpeed requires."""

    def __init__(
        self,
        transformer: nn.Module,
        heads: nn.ModuleDict | None = None,
        block: int | None = None,
    ) -> None:
        """Wrap `transformer` and, if there are heads, tap the block of that index.

        Args:
            heads: `Projector` of each objective, by name.
            block: index of the block whose image tokens the heads receive.
        """
        super().__init__()
        self.transformer: Any = transformer
        self.heads = nn.ModuleDict() if heads is None else heads
        self._tap: BlockTap | None = None
        if len(self.heads):
            blocks = blocks_of(transformer)
            if block is None or not 0 <= block < len(blocks):
                raise ValueError(
                    f"train.block must be under {len(blocks)}, the transformer's number of blocks, "
                    f"got {block}"
                )
            self._tap = BlockTap(blocks[block])

    def forward(
        self,
        inputs: Mapping[str, Any],
        token_grid: tuple[int, int, int],
        time_weights: Mapping[str, Tensor | None] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the transformer and, for each head, compute the features to compare.

        Args:
            inputs: keyword arguments of the transformer.
            token_grid: tokens in time, height and width.
            time_weights: interpolation weights `time_weights_TJ` by head; None or no entry if its
                maps and tokens correspond one to one.

        Returns:
            The transformer's output, and features_BTHWC by objective.
        """
        tap = self._tap if len(self.heads) else None
        with tap or nullcontext():
            output: Tensor = self.transformer(**inputs, return_dict=False)[0]
        if tap is None:
            return output, {}
        tokens_BJHWC = tap.take().unflatten(1, token_grid)
        weights = time_weights or {}
        features = {
            name: head(tokens_BJHWC, weights.get(name)) for name, head in self.heads.items()
        }
        return output, features


class Projector(nn.Module):
    """Per-token MLP with a linear skip, followed by interpolation in time to the objective's maps.

    Tokens are normalised, pass the hidden layers (each with norm and SiLU) and an output layer, and
    a linear skip is added. Maps that are interpolated between tokens (one per frame, or with
    CogVideoX 1.5 one per latent frame) pass a depthwise convolution over time. For an objective
    that compares fewer tokens, a learned downsampler makes one of each square.
    """

    def __init__(
        self, width: int, widths: Sequence[int], *, smooth: bool, downsample: int | None = None
    ) -> None:
        """Build the layers.

        Args:
            width: channels of the transformer's tokens.
            widths: channels of the hidden layers and of the output.
            smooth: add a convolution over time, for maps that are interpolated between tokens.
            downsample: side of the squares of tokens that `Downsampler` turns into one each; None
                keeps all tokens.
        """
        super().__init__()
        *hidden, out = widths
        self.norm = nn.LayerNorm(width)
        layers: list[nn.Module] = []
        before = width
        for after in hidden:
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU()]
            before = after
        self.layers = nn.Sequential(*layers, nn.Linear(before, out))
        self.skip = nn.Linear(width, out, bias=False)
        self.smooth = TemporalConvolution(out) if smooth else None
        self.downsampler = None if downsample is None else Downsampler(out, downsample)

    def forward(self, tokens_BJHWC: Tensor, time_weights_TJ: Tensor | None) -> Tensor:
        """Project tokens_BJHWC of the transformer's width: features_BTHWC of the last width.

        Args:
            tokens_BJHWC: output of the tapped block.
            time_weights_TJ: interpolation weights of `local_gram_flow.time_weights`; None if tokens
                and maps correspond one to one.
        """
        normed_BJHWC = self.norm(tokens_BJHWC)
        features_BTHWC = self.layers(normed_BJHWC) + self.skip(normed_BJHWC)
        if time_weights_TJ is not None:
            weights_TJ = time_weights_TJ.to(features_BTHWC)
            features_BTHWC = torch.einsum("tj,bjhwc->bthwc", weights_TJ, features_BTHWC)
        if self.smooth is not None:
            features_BTHWC = self.smooth(features_BTHWC)
        return features_BTHWC if self.downsampler is None else self.downsampler(features_BTHWC)


class TemporalConvolution(nn.Module):
    """Depthwise 3-tap convolution over time, initialised to the identity, with edge padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps_3C = torch.zeros(3, channels)
        taps_3C[1] = 1.0
        self.taps_3C = nn.Parameter(taps_3C)

    def forward(self, features_BTHWC: Tensor) -> Tensor:
        """Convolve over T; keeps the shape."""
        before = torch.cat([features_BTHWC[:, :1], features_BTHWC[:, :-1]], dim=1)
        after = torch.cat([features_BTHWC[:, 1:], features_BTHWC[:, -1:]], dim=1)
        taps = self.taps_3C
        return taps[0] * before + taps[1] * features_BTHWC + taps[2] * after


class Downsampler(nn.Module):
    """Convolution with stride equal to its size: one token for each square of tokens.

    Computed as a linear map of each square, whose gradient is deterministic on a GPU. Squares that
    cross the lower or right edge are padded with zeros.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        # torch draws these weights as those of a convolution with the same inputs.
        self.linear = nn.Linear(side * side * channels, channels)

    def forward(self, features_BTHWC: Tensor) -> Tensor:
        """Map features_BTHWC to [B, T, ceil(H / side), ceil(W / side), C]."""
        side, (height, width) = self.side, features_BTHWC.shape[2:4]
        padded_BTHWC = F.pad(features_BTHWC, (0, 0, 0, -width % side, 0, -height % side))
        rows_BTHsWC = padded_BTHWC.unflatten(2, (-1, side))
        squares_BTHWssC = rows_BTHsWC.unflatten(4, (-1, side)).transpose(3, 4)
        return self.linear(squares_BTHWssC.flatten(4))


@contextmanager
def eval_mode(student: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager: eval mode, no gradients; restores training modes and all RNG states after.

    Gradient checkpointing is inactive meanwhile, since there are no gradients.
    """
    modules = [module for module in student.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        student.eval()
        try:
            yield
        finally:
            for module in modules:
                module.training = True
            random.setstate(python_state)
            np.random.set_state(numpy_state)
