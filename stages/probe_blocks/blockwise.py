"""A CogVideoX transformer that runs block by block, with the weights of one block in memory.

Legend: B clip, N image token, L text token, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn

from stages.files.weight_checks import check_weights
from stages.train_student.step import StudentInputs


@dataclass(kw_only=True, slots=True)
class TokenState:
    """What blocks pass on: the tokens of one batch, on the host between two blocks."""

    tokens_BND: Tensor
    """Image tokens, in the transformer's dtype; after a block, what training taps there."""
    text_BLD: Tensor
    constants: dict[str, Any]
    """The other inputs of every block, such as the time embedding; on the device."""


class _Recorder(nn.Module):
    """Stands for all blocks, and keeps what the first one would receive."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        self.inputs = inputs
        return inputs["hidden_states"], inputs["encoder_hidden_states"]


class BlockwiseTransformer:
    """The base model's transformer, for forward passes without gradients.

    The model's own code embeds the inputs and calls the blocks; nothing of it is repeated here.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Check all weights, and load those outside the blocks.

        Args:
            folder: the base pipeline.
            dtype: dtype of weights and tokens.

        Raises:
            ValueError: the stored tensors do not match the model.
        """
        self._dtype, self._device = dtype, device
        weights = folder / "transformer"
        self._stored = check_weights(CogVideoXTransformer3DModel, weights)
        with init_empty_weights():
            transformer = CogVideoXTransformer3DModel.from_config(
                CogVideoXTransformer3DModel.load_config(weights)
            ).eval()
        self._blocks: nn.ModuleList = transformer.transformer_blocks
        self._recorder = _Recorder()
        transformer.transformer_blocks = nn.ModuleList([self._recorder])
        self._embedding = self._load(transformer, "")

    @torch.no_grad()
    def embed(self, inputs: StudentInputs) -> TokenState:
        """Compute what the first block receives."""
        self._embedding(
            hidden_states=inputs.latents_BFCHW,
            encoder_hidden_states=inputs.text_BLD,
            timestep=inputs.timestep_B,
            ofs=inputs.ofs,
            image_rotary_emb=inputs.rotary,
            return_dict=False,
        )
        constants, self._recorder.inputs = self._recorder.inputs, {}
        return TokenState(
            tokens_BND=constants.pop("hidden_states").cpu(),
            text_BLD=constants.pop("encoder_hidden_states").cpu(),
            constants=constants,
        )

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """Context manager: the block of that index, with its weights on the device."""
        block = self._load(self._blocks[number], f"transformer_blocks.{number}.")
        try:
            yield block
        finally:
            block.to("meta")

    @torch.no_grad()
    def advance(self, block: nn.Module, state: TokenState) -> None:
        """Replace a batch's tokens by the block's output."""
        tokens_BND, text_BLD = block(
            hidden_states=state.tokens_BND.to(self._device),
            encoder_hidden_states=state.text_BLD.to(self._device),
            **state.constants,
        )
        state.tokens_BND, state.text_BLD = tokens_BND.cpu(), text_BLD.cpu()

    def _load(self, module: nn.Module, prefix: str) -> nn.Module:
        """Read a module's weights; `prefix` comes before their names in the file."""
        tensors = {}
        for name in module.state_dict():
            stored = self._stored[prefix + name]
            with safe_open(stored.file, framework="pt") as file:
                tensors[name] = file.get_tensor(stored.name).to(self._device, self._dtype)
        module.load_state_dict(tensors, assign=True)
        return module.to(self._device)  # buffers that are not stored
