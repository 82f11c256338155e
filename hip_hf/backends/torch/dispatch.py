"""The torch backend's executors."""

from __future__ import annotations

from collections.abc import Callable

from hip_hf.backends.base import Executor
from hip_hf.backends.torch.delta import DeltaAttention
from hip_hf.backends.torch.hyper import HyperAttention
from hip_hf.backends.torch.sparse import SparseAttention

EXECUTORS: dict[str, Callable[..., Executor]] = dict(
    block_sparse=SparseAttention, hyper=HyperAttention, delta=DeltaAttention
)
