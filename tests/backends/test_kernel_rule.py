"""The rule that kernels are held to, twice the error of plain PyTorch, is no matter of luck."""

from __future__ import annotations

import pytest
import torch
from decode_cases import step
from helpers import eager
from tensor_cores import Emulation, Plugin, Reordered

pytestmark = pytest.mark.fast


def test_pytorch_itself_keeps_it_in_other_orders_of_summation() -> None:
    """A few numbers, whose largest error differs most. By the error of one order, up to half of the
    others would break it."""
    case = step(groups=1)
    visible, fields = case.visible(), dict(scale=case.scale)
    tolerance, _ = case.tolerances(visible)
    exact, _ = eager(case.q, case.k, case.v, visible, **fields)
    broken, orders = 0, range(100, 300)
    for seed in orders:
        with Reordered(seed):
            out, _ = eager(case.q, case.k, case.v, visible, dtype=torch.float32, **fields)
        broken += bool((out.double() - exact).abs().max() > tolerance)
    assert broken <= len(orders) // 20


def test_each_test_computes_as_tensor_cores_do_if_asked_to() -> None:
    """`--tensor-cores` holds while a test runs, and not after it."""
    before, test = Emulation.active, Plugin().pytest_pyfunc_call()
    next(test)
    assert Emulation.active
    with pytest.raises(StopIteration):
        test.send(None)
    assert Emulation.active == before
