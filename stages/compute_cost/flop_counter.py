"""Counts FLOPs and peak memory of code on the meta device, and measures a device's FLOP/s.

On torch's meta device tensors have shapes but no values, so that models of any size can be run.
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

TRANSFORMER_RATE_FRACTION = {"cpu": 0.7, "cuda": 0.3}
"""Typical fraction of the matmul rate that a large transformer reaches without gradients, by device
type: measured on one thread of a CPU with layers half as wide as T5-XXL; assumed for a GPU."""

_MIN_DURATION_S = 0.05
_REPEATS = 4
_MIN_SIDE, _MAX_SIDE = 256, 8192


class FlopCounter:
    """Context manager that counts FLOPs and the peak bytes of live tensors.

    A multiply-add is two FLOPs. Matrix products, convolutions and attention are counted, which are
    nearly all of a transformer; everything else is ignored. Attention counts as one fused kernel,
    which never stores the score matrix. Bytes are those of tensors created within the block,
    without library workspaces or fragmentation.

    With `training`, gradients are enabled: a backward pass within the block is counted too, and
    activations saved for it stay alive until then. Recomputation by gradient checkpointing counts
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
        """FLOPs so far."""
        return self._operations.flops + self._attention.flops

    @property
    def recomputed_flops(self) -> int:
        """FLOPs spent by the fused kernel to recompute its scores in the backward pass."""
        return self._attention.recomputed_flops

    @property
    def live_bytes(self) -> int:
        """Bytes of the tensors that are alive now."""
        return self._operations.live

    @property
    def peak_bytes(self) -> int:
        """Maximum of `live_bytes` so far."""
        return self._operations.peak


class _FusedAttention:
    """Replaces scaled_dot_product_attention: on the meta device torch would decompose it.

    It patches the function instead of using a torch function mode, since torch disables modes in a
    backward pass, where gradient checkpointing runs attention again.
    """

    def __init__(self) -> None:
        self.flops = self.recomputed_flops = 0

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

    def _count(self, flops: int, recomputed: int = 0) -> None:
        self.flops += flops
        self.recomputed_flops += recomputed


class _Attention(torch.autograd.Function):
    """Output, saved tensors and FLOPs of the fused kernel, without its computation."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, count: Callable[..., None]
    ) -> Tensor:
        # Two matrix products: query @ key^T and scores @ value.
        pairs = query.shape[:-1].numel() * key.shape[-2]
        count(2 * pairs * (query.shape[-1] + value.shape[-1]))
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        if any(ctx.needs_input_grad):
            # The kernel saves the logsumexp of each row of scores, in float32.
            logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(query, key, value, out, logsumexp)
            ctx.count = count
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors[:3]
        # Five: the recomputed scores, and the gradients of scores, value, query and key.
        pairs = query.shape[:-1].numel() * key.shape[-2]
        scores = 2 * pairs * query.shape[-1]
        ctx.count(3 * scores + 2 * 2 * pairs * value.shape[-1], recomputed=scores)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Operations(TorchDispatchMode):
    """Counts the FLOPs of each operation, and tracks the storages it allocates until they die.

    `FlopCounterMode` of torch uses the same FLOP formulas, but its module hooks keep tensors alive
    that gradient checkpointing recomputes.
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
            # In inference mode composite operations arrive here without being decomposed.
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **kwargs)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for storage in _storages(result):
            # A view of an input, such as a transposed weight, allocates nothing.
            if storage._cdata not in inputs:
                self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a product of square matrices.

    Doubles the side until a product takes long enough to be timed, and takes the fastest of a few
    repeats. Takes well under a second on most devices.
    """
    side = _MIN_SIDE
    while True:
        seconds = min(_time_matmul(side, device, dtype) for _ in range(_REPEATS))
        if seconds >= _MIN_DURATION_S or side >= _MAX_SIDE:
            return 2 * side**3 / seconds
        side *= 2


def _time_matmul(side: int, device: torch.device, dtype: torch.dtype) -> float:
    # A GPU can be faster on constant matrices than on real data. The training's random state stays.
    random = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, device=device, dtype=dtype, generator=random)
    _synchronize(device)
    started = time.perf_counter()
    matrix @ matrix
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
