"""fp32 on NVIDIA GPUs, where products are three of TF32: interpreted with that arithmetic, or
native on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import backward_cases
import decode_cases
import hyper_cases
import numpy as np
import prefill_cases
import pytest
import torch
from helpers import eager
from interpreter import DEVICE
from kernel_cases import check, make_case, spans_of
from tensor_cores import BITS_OF_BF16, BITS_OF_TF32, Emulation, TensorCores, cut, product, rounded

from hip_hf.backends.triton import hyper
from hip_hf.backends.triton.common import arguments

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def nvidia(monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    if torch.version.hip:
        pytest.skip("AMD's matrix units multiply fp32")
    threads(1)
    if DEVICE == "cpu":
        Emulation.start(monkeypatch)


CASES = {
    "prompt": lambda: prefill_cases.run(prefill_cases.large_logits()),
    "decode, D=128": lambda: decode_cases.run(decode_cases.step(dim=128, dv=128)),
    "decode, D=256": lambda: decode_cases.run(decode_cases.step(dim=256, dv=256)),
    "backward": lambda: backward_cases.run(make_case(spans_of((0, 71, 71)), heads=1, groups=4)),
    "backward, D=256": lambda: backward_cases.run(backward_cases.one_prompt(dim=256, dv=256)),
    "squares": lambda: hyper_cases.check_squares(torch.float32, 64, 64, 2, None, (32, 20)),
}


@pytest.mark.parametrize("name", CASES)
def test_three_products_are_as_exact_as_in_pytorch(name: str) -> None:
    CASES[name]()


@pytest.mark.parametrize("name", CASES)
def test_one_product_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels with plain TF32: each of the cases above would see it."""
    for module in (arguments, hyper):
        monkeypatch.setattr(module, "precision_of", lambda _: "tf32")
    with pytest.raises(AssertionError, match="off by"):
        CASES[name]()


@pytest.mark.parametrize("bits", [BITS_OF_TF32, BITS_OF_BF16])
def test_the_allowance_is_for_three_products_alone(bits: int) -> None:
    """PyTorch itself, held to the rule: with three products of TF32 it passes, with one of TF32 or
    of bf16 it fails."""
    case = make_case()
    visible = case.visible()
    for terms in (3, 1):
        with TensorCores((case.q.shape[-1],), terms, bits if terms == 1 else BITS_OF_TF32) as made:
            out, lse = eager(case.q, case.k, case.v, visible, scale=case.scale, dtype=torch.float32)
        assert made.count == 2
        if terms == 3:
            check(case, out, lse, case.reference())
        else:
            with pytest.raises(AssertionError, match="off by"):
                check(case, out, None, case.reference())


def test_the_arithmetic() -> None:
    """Splitting keeps 22 bits and more; products and sums of small integers are exact; other sums
    are cut off toward zero."""
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    high = rounded(x, BITS_OF_TF32)
    assert np.abs(high - x).max() > 0
    assert (np.abs(high - x) <= np.abs(x) * 2.0**-BITS_OF_TF32).all()
    rest = cut(x - high, BITS_OF_TF32)
    assert (
        np.abs(high.astype(np.float64) + rest - x) <= np.abs(x) * 2.0 ** -(2 * BITS_OF_TF32)
    ).all()
    integers = np.rint(x * 8)
    assert (product(integers, integers) == integers.astype(np.float64) @ integers).all()
    exact = x.astype(np.float64) @ x
    three, one = (
        np.abs(product(x, x, terms) - exact).max() / np.abs(exact).max() for terms in (3, 1)
    )
    assert three < 2.0**-20
    assert one > 2.0**-13
    ones = np.ones((1, 8), np.float32)
    ones[0, 4:] = 1.75 * 2.0**-26  # together seven eighths of a unit in the last place
    ones[0, 1:4] = 0
    assert product(ones, np.ones((8, 1), np.float32))[0, 0] == 1, "to nearest it would be above"
