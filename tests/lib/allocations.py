"""What a call allocates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hip_hf import workers


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation in this thread creates; views and `out=` create
    none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.op, self.total = 0, "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in {
            x.untyped_storage()
            for x in tensors(result)
            if x.untyped_storage().data_ptr() not in known
        }:
            self.total += storage.nbytes()
            if storage.nbytes() > self.largest:
                self.largest, self.op = storage.nbytes(), str(func)
        return result


def tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


def allocations(call: Callable[[], Any]) -> Allocations:
    workers.scratch.buffers.clear()
    with Allocations() as seen:
        call()
    return seen
