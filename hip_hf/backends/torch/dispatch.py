"""The torch backend's executors."""

from __future__ import annotations

from hip_hf.backends.base import Executors
from hip_hf.backends.torch.delta import DeltaAttention
from hip_hf.backends.torch.hyper import HyperAttention
from hip_hf.backends.torch.sparse import SparseAttention

EXECUTORS = Executors(SparseAttention, HyperAttention, DeltaAttention.around)
