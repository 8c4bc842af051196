"""A student's transformer that runs block by block, with the weights of one block in memory.

Legend: B clip, N image token, L text token, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from stages.files.weight_checks import check_weights
from stages.students.registry import student_of_transformer
from stages.students.weights import Part, model_class_of
from stages.train_student.step import StudentInputs


@dataclass(kw_only=True, slots=True)
class TokenState:
    """What blocks pass on: the tokens of one batch, on the host between two blocks."""

    tokens_BND: Tensor
    """Image tokens, in the transformer's dtype; after a block, what training taps there."""
    text_BLD: Tensor
    constants: tuple[tuple[Any, ...], dict[str, Any]]
    """The other inputs of every block, such as the time embedding; on the device."""


class _FirstBlockReachedError(Exception):
    """Ends a pass before the first block, with what it would receive."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = args, kwargs


class _Recorder(nn.Module):
    """Stands for all blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _FirstBlockReachedError(args, kwargs)


class BlockwiseTransformer:
    """The base model's transformer, for forward passes without gradients.

    The model's own code embeds the inputs and calls the blocks; nothing of it is repeated here.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, part: Part = "transformer"
    ) -> None:
        """Check all weights, and load those outside the blocks.

        Args:
            folder: the base pipeline.
            dtype: dtype of weights and tokens.
            part: the transformer's folder in the pipeline.

        Raises:
            ValueError: the stored tensors do not match the model.
        """
        self._dtype, self._device = dtype, device
        weights = folder / part
        model_class = model_class_of(part, folder)
        self._stored = check_weights(model_class, weights)
        with init_empty_weights():
            transformer = model_class.from_config(model_class.load_config(weights)).eval()
        self._list_name = student_of_transformer(model_class.__name__).BLOCKS
        self._blocks: nn.ModuleList = getattr(transformer, self._list_name)
        setattr(transformer, self._list_name, nn.ModuleList([_Recorder()]))
        self._embedding = self._load(transformer, "")

    @torch.no_grad()
    def embed(self, inputs: StudentInputs) -> TokenState:
        """Compute what the first block receives."""
        try:
            self._embedding(**inputs.transformer, return_dict=False)
        except _FirstBlockReachedError as reached:
            args, kwargs = reached.inputs
        # Every family's blocks take these two first, by position or by these names.
        named = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        return TokenState(
            tokens_BND=named.pop("hidden_states").cpu(),
            text_BLD=named.pop("encoder_hidden_states").cpu(),
            constants=(args[2:], named),
        )

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """Context manager: the block of that index, with its weights on the device."""
        block = self._load(self._blocks[number], f"{self._list_name}.{number}.")
        try:
            yield block
        finally:
            block.to("meta")

    @torch.no_grad()
    def advance(self, block: nn.Module, state: TokenState) -> None:
        """Replace a batch's tokens by the block's output."""
        args, kwargs = state.constants
        output = block(
            state.tokens_BND.to(self._device), state.text_BLD.to(self._device), *args, **kwargs
        )
        if isinstance(output, tuple):
            tokens_BND, text_BLD = output
            state.text_BLD = text_BLD.cpu()
        else:
            tokens_BND = output
        state.tokens_BND = tokens_BND.cpu()

    def _load(self, module: nn.Module, prefix: str) -> nn.Module:
        """Read a module's weights; `prefix` comes before their names in the file."""
        tensors = {}
        for name in module.state_dict():
            stored = self._stored[prefix + name]
            with safe_open(stored.file, framework="pt") as file:
                tensors[name] = file.get_tensor(stored.name).to(self._device, self._dtype)
        module.load_state_dict(tensors, assign=True)
        return module.to(self._device)  # buffers that are not stored
