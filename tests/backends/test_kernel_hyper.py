"""HyperAttention's kernels against the torch backend and against float64: hashes, one level of
squares, whole calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_qkv, small
from hyper_cases import check_squares
from interpreter import DEVICE
from kernel_cases import assert_half_precision, assert_same, call

import hip_hf
from hip_hf.backends.triton import hyper
from hip_hf.config import HiPConfig
from hip_hf.methods.hyper import Options, Square, projections
from hip_hf.methods.hyper import hashes as wanted_hashes

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

NEAR = 2e-5


def config_of(backend: str = "triton", dense_tail: int = 0, **options: Any) -> HiPConfig:
    given = dict(min_seq_len=24, block_size=16, sample_size=10) | options
    return small(
        method="hyper", options=given, backend=backend, dense_tail=dense_tail, dense_layers=0
    )


@pytest.mark.parametrize(("dim", "bits"), [(16, 7), (80, 7), (128, 20), (40, 30)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hashes(dim: int, bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(70, 3, dim, dtype=dtype).transpose(0, 1)  # as a view of another layout
    directions = projections(Options(lsh_num_projs=bits), dim, 1, x.device)
    got = hyper.hashes(x.to(DEVICE), directions.to(DEVICE)).cpu().long()
    clear = (x.float() @ directions).abs().amin(-1) > 1e-4  # a sign that rounding cannot turn
    assert clear.float().mean() > 0.9
    assert torch.equal(got[clear], wanted_hashes(x, directions)[clear])


def test_orders_keep_every_square_in_its_place() -> None:
    squares = [Square(20, 40, 0, 20), Square(61, 83, 40, 61)]
    level = hyper.Level.of(
        squares, 5, Options(block_size=8, sample_size=3), 0, 2, torch.device("cpu")
    )
    for bits in (3, 12, 30):  # as int16, int32 and int64
        codes = torch.randint(1 << bits, (2, 83), dtype=torch.int32)
        orders = (
            level.order(codes[:, 5:], level.row_bounds, bits),
            level.order(codes, level.key_bounds, bits),
        )
        for order, offset, ends in zip(
            orders, (5, 0), ([(20, 40), (61, 83)], [(0, 20), (40, 61)]), strict=True
        ):
            for first, end in ends:
                want = codes[:, first:end].argsort(dim=-1, stable=True) + first - offset
                assert torch.equal(order[:, first - offset : end - offset], want)


@pytest.mark.parametrize(
    ("dtype", "dim", "dv", "group", "softcap", "sizes"),
    [
        (torch.float32, 64, 64, 2, None, (32, 20)),
        (torch.float16, 80, 40, 1, 2.0, (32, 20)),
        (torch.bfloat16, 32, 96, 7, None, (20, 32)),
        (torch.float16, 128, 128, 4, None, (9, 0)),
        (torch.float32, 16, 16, 1, None, (9, 40)),
    ],
)
def test_squares(
    dtype: torch.dtype, dim: int, dv: int, group: int, softcap: float | None, sizes: tuple[int, int]
) -> None:
    check_squares(dtype, dim, dv, group, softcap, sizes)


def both(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: dict[str, Any], **fields: Any
) -> None:
    assert_same(
        *(call(q, k, v, config_of(backend, **config), **fields) for backend in ("triton", "torch")),
        NEAR,
    )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("tokens", "rows", "config"),
    [
        (101, 101, dict()),
        (101, 101, dict(sample_size=0, block_size=7)),
        (120, 33, dict()),
        (120, 33, dict(dense_tail=9)),
    ],
)
def test_prompts(tokens: int, rows: int, config: dict[str, Any]) -> None:
    both(*make_qkv(tokens, rows), config)


@pytest.mark.usefixtures("poison")
def test_a_batch_with_padding_softcap_and_sinks() -> None:
    """Rows of different lengths, one so short that it is exact; padding on either side."""
    fields = dict(softcap=3.0, sinks=torch.randn(4))
    both(
        *make_qkv(110, 40, batch=3),
        dict(dense_tail=5),
        key_start=[0, 33, 90],
        q_start=[50, 70, 70],
        **fields,
    )


def test_a_batch_row_does_not_depend_on_the_others() -> None:
    q, k, v = make_qkv(90, batch=2)
    whole = call(q, k, v, config_of())
    for row in range(2):
        one = slice(row, row + 1)
        assert torch.equal(call(q[one], k[one], v[one], config_of()).out, whole.out[one])


def test_half_precision_is_as_exact_as_the_torch_backend() -> None:
    assert_half_precision(config_of(), config_of("torch"))


def test_a_compiled_graph_gives_what_eager_gives() -> None:
    q, k, v = (x.to(DEVICE) for x in make_qkv(100, 60, batch=2))
    start, at = torch.tensor([0, 31], device=DEVICE), torch.tensor([40, 40], device=DEVICE)
    fields = dict(config=config_of(dense_tail=3), key_start=start, q_start=at, return_lse=True)
    graph = torch.compile(
        lambda *x: hip_hf.hip_attention(*x, **fields), fullgraph=True, backend="aot_eager"
    )
    for got, want in zip(graph(q, k, v), hip_hf.hip_attention(q, k, v, **fields), strict=True):
        assert torch.equal(got, want)
