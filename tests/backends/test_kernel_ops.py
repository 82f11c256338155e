"""The kernels as operators of PyTorch: they pass its own checks, and a compiled graph gives what
eager gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_near, make_qkv, small
from interpreter import DEVICE

import hip_hf
from hip_hf.backends.triton import ops

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]


def tensors(tokens: int = 96, rows: int = 40) -> list[torch.Tensor]:
    return [x.to(DEVICE) for x in make_qkv(tokens, rows)]


def compiled(**fields: Any) -> Callable[..., Any]:
    """Traced whole, forward and backward, but not lowered: that needs a C++ compiler."""
    return torch.compile(
        lambda *args: hip_hf.hip_attention(*args, **fields), fullgraph=True, backend="aot_eager"
    )


@pytest.mark.parametrize("sinks", [False, True])
def test_operators_pass_the_checks_of_torch(sinks: bool) -> None:
    q, k, v = tensors()
    config = small(dense_tail=5)
    table, tail = ops.make_table(q, k, None, None, config.dense_tail)
    extra = torch.zeros(4, device=DEVICE) if sinks else None
    chosen = (q, k, extra, table, config.text, 0.25, None, None, config.block_q)
    torch.library.opcheck(torch.ops.hip_hf.select.default, chosen)
    indices, counts = ops.select(*chosen)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    extra = None if extra is None else extra.requires_grad_()
    rest = (extra, table, tail, indices, counts, config.text, 0.25, None, None, config.block_q)
    torch.library.opcheck(torch.ops.hip_hf.attend.default, (*leaves, *rest))


@pytest.mark.parametrize(
    "config", [dict(dense_tail=7), dict(method="streaming"), dict(dense_below=10**6)]
)
def test_a_compiled_graph_gives_what_eager_gives(config: dict[str, Any]) -> None:
    settings = small(backend="triton", **config)
    results = []
    for call in (
        compiled(config=settings),
        lambda *args: hip_hf.hip_attention(*args, config=settings),
    ):
        leaves = [x.clone().requires_grad_() for x in tensors()]
        out = call(*leaves)
        out.square().sum().backward()
        results.append([out.detach().cpu(), *(x.grad.cpu() for x in leaves)])
        torch.manual_seed(0)
    for name, got, want in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_near(got, want, 1e-5, name)


def test_a_compiled_graph_reads_padding_on_the_device() -> None:
    q, k, v = (x.to(DEVICE) for x in make_qkv(120, 30, batch=2))
    start, at = torch.tensor([0, 41], device=DEVICE), torch.tensor([90, 80], device=DEVICE)
    settings = small(backend="triton", dense_tail=3)
    call = compiled(config=settings, key_start=start, q_start=at, return_lse=True)
    got = call(q, k, v)
    want = hip_hf.hip_attention(
        q, k, v, config=settings, key_start=start, q_start=at, return_lse=True
    )
    assert_near(got[0].cpu(), want[0].cpu())
    assert_near(got[1].cpu(), want[1].cpu(), 1e-5, "lse")


def test_tables_are_those_of_the_spans() -> None:
    from hip_hf.backends.triton.common.sequences import Sequences
    from hip_hf.problem import make_spans

    q, k, _ = make_qkv(50, 20, batch=4)
    starts = [torch.tensor([0, 7, 35, 49]), torch.tensor([30, 10, 25, 30])]
    whole, tail = ops.make_table(q, k, *starts, 4)
    spans = make_spans(q, k, *starts)
    assert torch.equal(whole, Sequences.of(spans, torch.device("cpu")).table)
    assert (whole[3] - tail[3] == tail[2] - whole[2]).all()
    assert tail[3].tolist() == [4, 4, 4, 1]


@pytest.mark.parametrize(
    "way", ["plain", "learning", "compiled", "compiled, learning", "hyper, compiled"]
)
def test_a_prompts_output_has_all_heads_of_a_token_side_by_side(way: str) -> None:
    """As models go on with it: they would copy any other."""
    given = [x.requires_grad_("learning" in way) for x in tensors()]
    config = small(
        backend="triton", dense_below=0, **(dict(method="hyper") if "hyper" in way else {})
    )
    attention = (
        compiled(config=config)
        if "compiled" in way
        else lambda *args: hip_hf.hip_attention(*args, config=config)
    )
    out = attention(*given)
    assert out.shape == given[0].shape
    assert out.transpose(1, 2).is_contiguous()
    assert not out.is_contiguous()
