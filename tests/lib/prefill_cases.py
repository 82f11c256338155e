"""The prefill kernel on one case, against the torch reference."""

from __future__ import annotations

from kernel_cases import Case, check, make_case

from hip_hf.backends.triton.attention.prefill import prefill


def large_logits() -> Case:
    """Every ninth key makes logits so large that weights are all but zero or one."""
    case = make_case(scale=3.0)
    case.k[:, :, ::9] *= 20
    return case


def run(case: Case, page_size: int = 0, need_lse: bool = True) -> None:
    out, lse = case.empty()
    prefill(case.operands(out, lse if need_lse else None, page_size), case.part())
    check(case, out, lse if need_lse else None, case.reference())
