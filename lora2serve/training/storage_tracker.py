"""Bytes of all tensors alive, and their peak: what torch.cuda.max_memory_allocated says of a GPU, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts each storage once, from the operation that makes it until nobody holds it; fake tensors as real ones.

    What is alive before is not known to it: ``add`` counts it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0  # bytes
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, operation: Callable[..., object], types: Sequence[type], values: Sequence[object] = (),
        options: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        output = operation(*values, **(options or {}))
        for item in tree_iter(output):
            if isinstance(item, Tensor):
                self.add(item)
        if str(operation).startswith("bitsandbytes.gemm_4bit"):
            self.peak = max(self.peak, self.now + unpacked_bytes(values))
        return output

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key)

    def restart(self) -> None:
        """Let the peak begin at what is alive now."""
        self.peak = self.now

    def _release(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def unpacked_bytes(values: Sequence[object]) -> int:
    """What ``gemm_4bit`` of bitsandbytes 0.50 allocates inside: the weight in full, and its scales."""
    states, shape = values[0], values[2]
    assert isinstance(states, Tensor) and isinstance(shape, Sequence)
    scales = values[7] if len(values) > 7 else None
    inside = int(shape[0]) * int(shape[1]) * states.element_size()
    return inside + (4 * scales.numel() if isinstance(scales, torch.Tensor) else 0)
