"""Counts operations and live bytes of code that runs on shapes alone, and measures a device's rate.

The estimates of both stages run models under a `Meter` on torch's meta device, where tensors have
shapes and no values; stage one's divides by the rate.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_SHORTEST_S = 0.05
_REPEATS = 4
_SMALLEST_SIDE, _LARGEST_SIDE = 256, 8192


class Meter:
    """Counts what runs in a `with` block: operations, and the most bytes of tensors alive at once.

    A multiplication and an addition are two operations. Counted are products of matrices,
    convolutions and attention, which are nearly all of a transformer; the rest is left out.
    Attention counts as one fused kernel, whose table of scores is never in memory. Bytes are those
    of tensors made within the block, without workspaces of libraries and without fragmentation.

    With `training` gradients flow: a backward pass within the block is counted too, and what the
    forward pass keeps for it is alive until then. What gradient checkpointing runs again counts
    again.
    """

    def __init__(self, *, training: bool = False) -> None:
        self._training = training
        self._operations = _Operations()
        self._attention = _FusedAttention()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(torch.enable_grad() if self._training else torch.inference_mode())
        self._stack.enter_context(self._operations)
        self._stack.enter_context(self._attention)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def flops(self) -> int:
        """Operations so far."""
        return self._operations.flops + self._attention.flops

    @property
    def scores_again_flops(self) -> int:
        """Those of them by which the fused kernel makes its scores again in the backward pass."""
        return self._attention.again

    @property
    def live_bytes(self) -> int:
        """Of the tensors that are alive now."""
        return self._operations.live

    @property
    def peak_bytes(self) -> int:
        """The most that `live_bytes` has been."""
        return self._operations.peak


class _FusedAttention:
    """Stands in for the fused kernel: on shapes alone torch would take attention apart.

    It takes the function's place in its module, not in a torch function mode: torch puts modes
    aside during a backward pass, where gradient checkpointing runs attention again.
    """

    def __init__(self) -> None:
        self.flops = self.again = 0

    def __enter__(self) -> None:
        self._original = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._attend

    def __exit__(self, *exc: object) -> None:
        F.scaled_dot_product_attention = self._original

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        out: Tensor = _Attention.apply(query, key, value, self._count)
        return out

    def _count(self, flops: int, again: int = 0) -> None:
        self.flops += flops
        self.again += again


class _Attention(torch.autograd.Function):
    """The fused kernel's shapes: what it makes, what it keeps, how many operations it takes."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, count: Callable[..., None]
    ) -> Tensor:
        # Two products: query with key over its width, the scores with value.
        pairs = query.shape[:-1].numel() * key.shape[-2]
        count(2 * pairs * (query.shape[-1] + value.shape[-1]))
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        if any(ctx.needs_input_grad):
            # Of the scores it keeps the logarithm of their sum, float32 for each row.
            logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(query, key, value, out, logsumexp)
            ctx.count = count
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors[:3]
        # Five: the scores again, and the gradients of scores, value, query and key.
        pairs = query.shape[:-1].numel() * key.shape[-2]
        scores = 2 * pairs * query.shape[-1]
        ctx.count(3 * scores + 2 * 2 * pairs * value.shape[-1], again=scores)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Operations(TorchDispatchMode):
    """Counts each operation, and follows the storages that it makes until nobody holds them.

    Torch's own `FlopCounterMode` has the same table of operations, but its hooks on modules keep
    alive what gradient checkpointing runs again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(function._overloadpacket)
        if count is None and torch.is_inference_mode_enabled():
            # There operations that are made of others come whole.
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **kwargs)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for storage in _storages(result):
            # A view of what was there before, such as a transposed weight, is nothing new.
            if storage._cdata not in given:
                self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of a product of square matrices, in operations per second.

    The side grows until a product takes long enough to be timed; the fastest of some repeats
    counts. Takes well under a second on most devices.
    """
    side = _SMALLEST_SIDE
    while True:
        seconds = min(_seconds_of_product(side, device, dtype) for _ in range(_REPEATS))
        if seconds >= _SHORTEST_S or side >= _LARGEST_SIDE:
            return 2 * side**3 / seconds
        side *= 2


def _seconds_of_product(side: int, device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    _wait(device)
    started = time.perf_counter()
    matrix @ matrix
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
