"""Fuzzing: calls and sequences of calls that nobody would think of, against plain attention in
float64.

A seeded subset runs with the other tests; `make fuzz` runs 100,000 cases.
"""

from __future__ import annotations

from typing import Any

import pytest
from fuzz_cases import (
    TOLERANCE,
    cases,
    configs,
    covers,
    expected,
    keys_read,
    selected_alone,
    shapes,
    tensor_arguments,
    tensors,
)
from helpers import assert_near
from hypothesis import given
from hypothesis import strategies as st

from hip_hf import hip_attention

pytestmark = pytest.mark.usefixtures("poison")


@cases(0.5)
@given(data=st.data())
def test_one_call(data: Any) -> None:
    shape, config = data.draw(shapes()), data.draw(configs())
    q, k, v = data.draw(tensors(shape)).make()
    told = data.draw(st.booleans())
    result = hip_attention(
        q, k, v, config=config, return_lse=told, return_mask=told, **tensor_arguments(shape)
    )
    out, lse, mask = result if told else (result, None, None)
    assert out.dtype == q.dtype
    visible = shape.visible()
    if not covers(config, shape.tokens):
        if not told or not selected_alone(config):  # who knows what was read
            assert out.isfinite().all()
            return
        if mask is not None:  # else it went dense
            visible = keys_read(mask, config, q, k, shape)
    want, want_lse = expected(q, k, v, shape, visible)
    assert_near(out, want, TOLERANCE[shape.dtype])
    if told:
        assert_near(lse, want_lse, 3 * TOLERANCE[shape.dtype], "lse")  # of size 20
