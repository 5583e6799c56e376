"""Bytes that tensors without data would occupy if they had any."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Context manager that adds up the storages allocated inside on the meta device, and takes them off when they are freed.

    Exact for everything an operator returns; scratch memory inside an operator is not seen.

    Attributes:
        live: bytes allocated inside and not yet freed.
        peak: largest value of `live`; may be set back by the caller.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operator and count what it allocates."""
        result = func(*args, **(kwargs or {}))
        if all(output.alias_info is None for output in func._schema.returns):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.is_meta:
                    self._allocated(leaf.untyped_storage())
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:  # a view that does not say so, such as _unsafe_view
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
