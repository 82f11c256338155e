"""The executors of the Triton backend, and how one of them runs a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hip_hf.backends.base import Executor, Executors
from hip_hf.backends.triton.delta import DeltaAttention
from hip_hf.backends.triton.hyper import HyperAttention
from hip_hf.backends.triton.sparse import SparseAttention
from hip_hf.problem import AttentionProblem
from hip_hf.state import DecodeState

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

EXECUTORS = Executors(SparseAttention, HyperAttention, DeltaAttention.around)


def run_by_kernels(
    problem: AttentionProblem,
    config: HiPConfig,
    state: DecodeState | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    mask: bool,
) -> Executor:
    """Run the sparse path of one call, which writes out `[B, Hq, Tq, Dv]` and lse fp32
    `[B, Hq, Tq]`. Where autograd follows, the results are new tensors instead, which the executor
    holds."""
    call = EXECUTORS.pick(config)(problem, config, out, lse, mask)
    with torch.cuda.device_of(problem.q):  # Triton launches on the current device
        call.run(state)
    return call
