"""HyperAttention's kernels against the torch backend and against float64: hashes, one level of squares, whole calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_near, make_qkv, small
from interpreter import DEVICE
from kernel_cases import assert_half_precision, assert_same, call, precisions

import hip_hf
from hip_hf.backends.triton import hyper
from hip_hf.backends.triton.common.arguments import Logits
from hip_hf.config import HiPConfig
from hip_hf.methods.hyper import Options, Square, projections, tile
from hip_hf.methods.hyper import hashes as wanted_hashes

pytestmark = pytest.mark.kernels

NEAR = 2e-5


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


def config_of(backend: str = "triton", dense_tail: int = 0, **options: Any) -> HiPConfig:
    given = dict(min_seq_len=24, block_size=16, sample_size=10) | options
    return small(method="hyper", options=given, backend=backend, dense_tail=dense_tail, dense_layers=0)


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
    level = hyper.Level.of(squares, 5, Options(block_size=8, sample_size=3), 0, 2, torch.device("cpu"))
    for bits in (3, 12, 30):  # as int16, int32 and int64
        codes = torch.randint(1 << bits, (2, 83), dtype=torch.int32)
        orders = level.order(codes[:, 5:], level.row_bounds, bits), level.order(codes, level.key_bounds, bits)
        for order, offset, ends in zip(orders, (5, 0), ([(20, 40), (61, 83)], [(0, 20), (40, 61)]), strict=True):
            for first, end in ends:
                want = codes[:, first:end].argsort(dim=-1, stable=True) + first - offset
                assert torch.equal(order[:, first - offset : end - offset], want)


def squares_in(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, level: hyper.Level, orders: Any, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that are in a square, and what they get from it alone, in the tensors' dtype and by plain operations."""
    heads, group = q.shape[0], q.shape[0] // k.shape[0]
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for i, (first, rows, key_first, keys, block_rows, size, samples) in enumerate(level.table.t().tolist()):
        for head in range(heads):
            order = orders[1][head // group, key_first : key_first + keys]
            ranks = level.samples[i, head // group, :samples].long()
            for block, at in enumerate(range(0, rows, block_rows)):
                start = int(level.starts[i, block])
                drawn = ranks[(ranks < start) | (ranks >= start + size)]
                tokens = torch.cat([order[start : start + size], order[drawn]])
                row = orders[0][head, first + at : first + min(at + block_rows, rows)]
                logits = q[head, row] @ k[head // group, tokens].t() * q.shape[-1] ** -0.5
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits[:, size:] += math.log(keys / samples) if samples else 0.0
                out[head, row] = logits.softmax(-1) @ v[head // group, tokens]
                lse[head, row] = logits.logsumexp(-1).to(lse.dtype)
    return lse[0] > -torch.inf, out, lse


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
def test_squares(dtype: torch.dtype, dim: int, dv: int, group: int, softcap: float | None, sizes: tuple[int, int]) -> None:
    """One level on given orders, merged into what the rows have: error against float64 at most twice that of plain operations."""
    q, k, v = (x[0] for x in make_qkv(133, heads=2 if group < 4 else 1, groups=group, dim=dim, dv=dv, dtype=dtype))
    squares, options = [Square(33, 66, 0, 33), Square(99, 133, 66, 99)], Options(block_size=sizes[0], sample_size=sizes[1])
    level = hyper.Level.of(squares, 0, options, 3, len(k), torch.device("cpu"))
    assert tile(squares[1], options, torch.device("cpu")).rows < squares[1].rows  # several query blocks
    orders = [level.order(torch.randint(99, x.shape[:2]), ends, 7) for x, ends in ((q, level.row_bounds), (k, level.key_bounds))]
    before = torch.randn(*q.shape[:2], dv), torch.randn(q.shape[:2])
    out, lse = (x.clone().to(DEVICE) for x in before)
    out[:, :33], lse[:, :33] = torch.nan, torch.nan  # rows of no square are left alone
    on_device = hyper.Level(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in vars(level).values()))
    hyper.attend_squares(
        *(x.to(DEVICE) for x in (q, k, v)), out, lse, tuple(x.to(DEVICE) for x in orders), on_device, Logits(dim**-0.5, softcap)
    )

    def merged(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        inside, more, more_lse = squares_in(*(x.to(dtype) for x in (q, k, v)), level, orders, softcap)
        old, old_lse = (x.to(more_lse.dtype) for x in before)
        whole = torch.logaddexp(old_lse, more_lse)
        both = (old_lse - whole).exp()[..., None] * old + (more_lse - whole).exp()[..., None] * more.to(old.dtype)
        return both[:, inside], whole[:, inside]

    inside = torch.cat([torch.arange(33, 66), torch.arange(99, 133)])
    want, plain = merged(torch.float64), []
    for precision in precisions(q, dim):
        with precision:
            plain.append(merged(dtype))
    for i, (got, exact, what) in enumerate(zip((out, lse), want, ("out", "lse"), strict=True)):
        error = max(float((rough[i] - exact).abs().max()) for rough in plain)
        tolerance = 2 * max(error, torch.finfo(dtype).eps * float(exact.abs().max()))
        assert_near(got[:, inside].cpu(), exact, tolerance, what)
    rest = [i for i in range(133) if i not in inside.tolist()]
    assert out[:, :33].isnan().all()
    assert torch.equal(out[:, rest[33:]].cpu(), before[0][:, rest[33:]])


def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: dict[str, Any], **fields: Any) -> None:
    assert_same(*(call(q, k, v, config_of(backend, **config), **fields) for backend in ("triton", "torch")), NEAR)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("tokens", "rows", "config"),
    [(101, 101, dict()), (101, 101, dict(sample_size=0, block_size=7)), (120, 33, dict()), (120, 33, dict(dense_tail=9))],
)
def test_prompts(tokens: int, rows: int, config: dict[str, Any]) -> None:
    both(*make_qkv(tokens, rows), config)


@pytest.mark.usefixtures("poison")
def test_a_batch_with_padding_softcap_and_sinks() -> None:
    """Rows of different lengths, one so short that it is exact; padding on either side."""
    fields = dict(softcap=3.0, sinks=torch.randn(4))
    both(*make_qkv(110, 40, batch=3), dict(dense_tail=5), key_start=[0, 33, 90], q_start=[50, 70, 70], **fields)


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
    graph = torch.compile(lambda *x: hip_hf.hip_attention(*x, **fields), fullgraph=True, backend="aot_eager")
    for got, want in zip(graph(q, k, v), hip_hf.hip_attention(q, k, v, **fields), strict=True):
        assert torch.equal(got, want)
