"""Split-K decode on one case, against the torch reference."""

from __future__ import annotations

from typing import Any

import torch
from interpreter import DEVICE
from kernel_cases import Case, check, make_case, spans_of

from hip_hf.backends.triton.attention.decode import DecodeScratch, decode


def scratch_for(case: Case, splits: int) -> DecodeScratch:
    scratch = DecodeScratch.make(splits, case.q.to(DEVICE), case.v.shape[-1])
    scratch.out.fill_(torch.nan)
    scratch.lse.fill_(torch.nan)
    return scratch


def run(case: Case, splits: int = 4, page_size: int = 0) -> None:
    out, lse = case.empty()
    decode(case.operands(out, lse, page_size), case.part(), scratch_for(case, splits))
    check(case, out, lse, case.reference())


def step(**fields: Any) -> Case:
    """One row each of two sequences of different length, one with padding in front."""
    return make_case(
        spans_of((0, 340, 1), (60, 233, 1)), **{**dict(per_row=True, most=9), **fields}
    )
