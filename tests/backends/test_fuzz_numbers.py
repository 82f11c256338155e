"""Fuzzing: numbers that nobody should have, and arguments that are not allowed.

Never a crash, or NaN where dense attention has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzz_cases import Draw, Shape, cases, configs, refused, shapes, tensor_arguments, tensors
from helpers import eager, make_problem
from hypothesis import given
from hypothesis import strategies as st

from hip_hf import DecodeState, HiPConfig, hip_attention
from hip_hf.attention import attend

pytestmark = pytest.mark.usefixtures("poison")

NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


def sized(share: float) -> Any:
    """Numbers as large as a share of the largest: products of them may overflow."""
    return lambda x, at: torch.sign(x) * torch.finfo(x.dtype).max * share


def one(value: float) -> Any:
    """One number of `value`, the others as they are."""

    def changed(x: torch.Tensor, at: int) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        limit = torch.finfo(x.dtype).max
        x.view(-1)[at % x.numel()] = (
            value if value in NOT_FINITE or value != value else max(-limit, min(limit, value))
        )
        return x

    return changed


FINITE = {
    "as it is": lambda x, at: x,
    "equal": lambda x, at: torch.full_like(x, 0.7),
    "zero": lambda x, at: torch.zeros_like(x),
    "tiny": lambda x, at: x * torch.finfo(x.dtype).tiny / 4,
    "huge logits": lambda x, at: x * 100,
    "a hundredth of the largest": sized(0.01),
    "the largest": sized(1.0),
    "one of the largest": one(3e38),
    "one of the smallest": one(-3e38),
}
SPOILT = {f"one of {value}": one(value) for value in NOT_FINITE}


def finite_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape, visible: torch.Tensor
) -> torch.Tensor:
    """Rows `[B, Hq, Tq]` for which plain attention has numbers, and not by a hair: in fp32 for
    fp16, as PyTorch computes it, else in their dtype; whether it scales before or after the
    product, and in whatever order it adds up. In bf16 only where all rows of a KV head have
    numbers: with AMX, PyTorch's product of two bf16 matrices reads past the end of a row of 50
    weights, and NaN there, in the next row, spoils this one although it is multiplied by 0."""
    scale = 4 * shape.more.get("scale", q.shape[-1] ** -0.5)
    more = [shape.more.get(name) for name in ("softcap", "sinks")]
    finite = torch.ones(q.shape[:3], dtype=torch.bool)
    for dtype in {
        torch.promote_types(q.dtype, torch.float32),
        torch.float32 if q.dtype == torch.float16 else q.dtype,
    }:
        for before, after in ((1.0, scale), (scale, 1.0)):
            out, _ = eager(q.to(dtype) * before, k, v, visible, after, *more, dtype=dtype)
            finite &= out.isfinite().all(-1)
            if q.shape[-1] > 1:
                keys = k.to(dtype).abs().repeat_interleave(shape.groups, 1)
                logits = (q.to(dtype) * before).abs() @ keys.transpose(2, 3) * after
                finite &= (logits.isfinite() | ~visible).all(-1)
    if q.dtype == torch.bfloat16:
        by_head = finite.unflatten(1, (-1, shape.groups))
        finite = by_head.flatten(2).all(-1)[:, :, None, None].expand_as(by_head).flatten(1, 2)
    return finite


@cases(0.2)
@given(data=st.data())
def test_numbers(data: Any) -> None:
    shape, config = data.draw(shapes(most=70)), data.draw(configs())
    q, k, v = data.draw(tensors(shape)).make()
    at = data.draw(st.integers(0, 2**16))
    q, k, v = (FINITE[data.draw(st.sampled_from(list(FINITE)))](x, at) for x in (q, k, v))
    v = v.clamp(
        *(sign * torch.finfo(v.dtype).max / (2 * shape.tokens) for sign in (-1, 1))
    )  # sums come before the division
    out, lse = hip_attention(q, k, v, config=config, return_lse=True, **tensor_arguments(shape))  # type: ignore[misc]
    visible = shape.visible()
    plain = finite_rows(q, k, v, shape, visible)
    if config.delta is None and config.method != "hyper":
        assert out.isfinite().all(-1)[plain].all(), "NaN where plain attention has none"
        assert not lse.isnan()[plain].any()
        # what attention gives lies between the values that it may read
        low, high = (getattr(v.double(), name)(2).values[:, :, None] for name in ("min", "max"))
        low, high = (
            x.repeat_interleave(shape.groups, 1).expand(out.shape)
            for x in (low.clamp(max=0), high.clamp(min=0))
        )
        room = (
            8 * torch.finfo(out.dtype).eps * torch.maximum(low.abs(), high.abs())
            + torch.finfo(out.dtype).tiny
        )
        between = (out.double() >= low - room) & (out.double() <= high + room)
        assert between[plain].all()


@cases(0.05)
@given(data=st.data())
def test_numbers_that_are_not_finite(data: Any) -> None:
    """In q and k they are refused where they are real; in v they stay in their head and batch
    row."""
    shape, config = data.draw(shapes(most=70)), data.draw(configs())
    made = list(data.draw(tensors(shape)).make())
    which, at = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2**16))
    made[which] = SPOILT[data.draw(st.sampled_from(list(SPOILT)))](made[which], at)
    q, k, v = made
    if which < 2:
        _, why = refused(lambda: hip_attention(q, k, v, config=config, **tensor_arguments(shape)))
        assert not why or why.startswith(f"{'qk'[which]}[")
        fields = {"scale": q.shape[-1] ** -0.5} | shape.more
        attend(
            make_problem(q, k, v, shape.key_start, shape.q_start, **fields), config
        )  # where nobody looked
        return
    out = hip_attention(q, k, v, config=config, **tensor_arguments(shape))
    spoilt = (~v.isfinite()).flatten(2).any(-1).repeat_interleave(shape.groups, 1)
    assert isinstance(out, torch.Tensor)
    assert out.isfinite().flatten(2).all(-1)[~spoilt].all()


ANYTHING = (
    None,
    True,
    -1,
    0,
    1,
    3,
    1 << 40,
    1.5,
    float("nan"),
    float("inf"),
    "1",
    [],
    [0],
    torch.tensor(1),
    torch.zeros(2, 2),
    {},
)


@st.composite
def strange(draw: Draw) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call, of which some are not what they should be."""
    sizes = [1, 2, 4, 6, 17]
    made: list[Any] = []
    for _ in range(3):
        shape = (
            [draw(st.sampled_from(sizes)) for _ in range(4)]
            if draw(st.booleans())
            else [1, 2, 17, 4]
        )
        if draw(st.integers(0, 9)) == 9:
            shape = shape[: draw(st.integers(0, 3))] + [0] * draw(st.integers(0, 2))
        dtype = draw(
            st.sampled_from(
                [torch.float32] * 5
                + [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]
            )
        )
        made.append(
            torch.ones(shape, dtype=dtype)
            if draw(st.integers(0, 19))
            else draw(st.sampled_from(ANYTHING))
        )
    names = (
        "config",
        "scale",
        "key_start",
        "q_start",
        "sliding_window",
        "softcap",
        "sinks",
        "state",
        "layer",
        "positions",
    )
    given_names = draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
    return made, {name: draw(st.sampled_from(ANYTHING)) for name in given_names}


@cases(0.1)
@given(strange())
def test_arguments_that_are_not_allowed(arguments: tuple[list[Any], dict[str, Any]]) -> None:
    """Either the call is right, or one sentence says what is allowed."""
    tensors_, fields = arguments
    out, why = refused(lambda: hip_attention(*tensors_, **fields))
    assert ", allowed: " in why if out is None else out.isfinite().all()


@cases(0.05)
@given(data=st.data())
def test_settings_that_are_not_allowed(data: Any) -> None:
    """Either settings are refused in one sentence, or a call with them works."""
    fields = data.draw(
        st.fixed_dictionaries(
            {}, optional={name: st.sampled_from(ANYTHING) for name in HiPConfig().to_dict()}
        )
    )
    base = dict(block_k=1, budget=3, sink=1, window=2, dense_below=0, block_q=4)
    config, why = refused(lambda: HiPConfig(**{**base, **fields}))
    if config is None:
        assert "allowed: " in why
        return
    assert HiPConfig.from_dict(config.to_dict()) == config
    q = torch.ones(1, 2, 20, 4)
    if config.extend is None and config.backend != "triton":
        assert hip_attention(q, q, q, config=config, state=DecodeState()).isfinite().all()  # type: ignore[union-attr]
