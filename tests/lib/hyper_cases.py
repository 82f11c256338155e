"""HyperAttention's kernel for squares on one case, against plain operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from helpers import assert_near, make_qkv
from interpreter import DEVICE
from kernel_cases import precisions

from hip_hf.backends.triton import hyper
from hip_hf.backends.triton.common.arguments import Logits
from hip_hf.methods.hyper import Options, Square, tile_square


def squares_in(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    level: hyper.Level,
    orders: Any,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that are in a square, and what they get from it alone, in the tensors' dtype and by
    plain operations."""
    heads, group = q.shape[0], q.shape[0] // k.shape[0]
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for i, (first, rows, key_first, keys, block_rows, size, samples) in enumerate(
        level.table.t().tolist()
    ):
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


def check_squares(
    dtype: torch.dtype, dim: int, dv: int, group: int, softcap: float | None, sizes: tuple[int, int]
) -> None:
    """One level on given orders, merged into what the rows have: error against float64 at most
    twice that of plain operations."""
    q, k, v = (
        x[0]
        for x in make_qkv(
            133, heads=2 if group < 4 else 1, groups=group, dim=dim, dv=dv, dtype=dtype
        )
    )
    squares, options = (
        [Square(33, 66, 0, 33), Square(99, 133, 66, 99)],
        Options(block_size=sizes[0], sample_size=sizes[1]),
    )
    level = hyper.Level.of(squares, 0, options, 3, len(k), torch.device("cpu"))
    assert (
        tile_square(squares[1], options, torch.device("cpu")).rows < squares[1].rows
    )  # several query blocks
    orders = [
        level.order(torch.randint(99, x.shape[:2]), ends, 7)
        for x, ends in ((q, level.row_bounds), (k, level.key_bounds))
    ]
    before = torch.randn(*q.shape[:2], dv), torch.randn(q.shape[:2])
    out, lse = (x.clone().to(DEVICE) for x in before)
    out[:, :33], lse[:, :33] = torch.nan, torch.nan  # rows of no square are left alone
    on_device = hyper.Level(
        *(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in vars(level).values())
    )
    hyper.attend_squares(
        *(x.to(DEVICE) for x in (q, k, v)),
        out,
        lse,
        tuple(x.to(DEVICE) for x in orders),
        on_device,
        Logits(dim**-0.5, softcap),
    )

    def merged(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        inside, more, more_lse = squares_in(
            *(x.to(dtype) for x in (q, k, v)), level, orders, softcap
        )
        old, old_lse = (x.to(more_lse.dtype) for x in before)
        whole = torch.logaddexp(old_lse, more_lse)
        both = (old_lse - whole).exp()[..., None] * old + (more_lse - whole).exp()[
            ..., None
        ] * more.to(old.dtype)
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
