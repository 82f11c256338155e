"""What the tests compare with: plain attention in any dtype, and the keys that a sparse call must
have read."""

from __future__ import annotations

from typing import Any

import torch

from hip_hf.attention import Result, attend
from hip_hf.config import HiPConfig
from hip_hf.geometry import BlockMask
from hip_hf.problem import AttentionProblem, make_spans
from hip_hf.state import DecodeState

# Calls with up to this many query rows are decode steps, in which every row selects for itself.
DECODE_ROWS = 16

Starts = list[int] | None


def small(**fields: Any) -> HiPConfig:
    """Settings at which the sparse path runs on a few hundred keys: four selected blocks of four
    keys."""
    sizes = dict(budget=16, block_q=16, block_k=4, sink=4, window=16, dense_below=0, dense_tail=0)
    search = dict(
        representative="blend", query_stride=4, beam=2, rescore=1
    )  # whatever the defaults are
    return HiPConfig(**{**sizes, **search, **fields})


def make_qkv(
    tokens: int,
    rows: int | None = None,
    batch: int = 1,
    heads: int = 2,
    groups: int = 2,
    dim: int = 16,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    needles: dict[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q `[batch, heads * groups, rows, dim]`, k and v. `needles` `{query row: key}`: pairs
    that match strongly."""
    rows = tokens if rows is None else rows
    q = torch.randn(batch, heads * groups, rows, dim, dtype=torch.float64)
    k = torch.randn(batch, heads, tokens, dim, dtype=torch.float64)
    v = torch.randn(batch, heads, tokens, dim if dv is None else dv, dtype=torch.float64)
    for row, key in (needles or {}).items():
        k[:, :, key] = (
            2
            * dim**0.5
            * torch.nn.functional.normalize(
                torch.randn(batch, heads, dim, dtype=torch.float64), dim=-1
            )
        )
        q[:, :, row] = 2 * k[:, :, key].repeat_interleave(groups, 1)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and log-sum-exp, computed in `dtype`, under the mask `visible` (broadcasts to
    `[B, Hq, Tq, Tk]`)."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (
        q.to(dtype),
        k.to(dtype).repeat_interleave(groups, 1),
        v.to(dtype).repeat_interleave(groups, 1),
    )
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    some = visible.any(-1, keepdim=True)
    columns = [logits]
    if sinks is not None:
        columns.append(sinks.to(dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1))
    every = torch.cat(columns, dim=-1)
    weights = torch.softmax(every.masked_fill(~some, 0.0), dim=-1)[..., : k.shape[2]] * some
    lse = torch.logsumexp(every, dim=-1).masked_fill(
        ~some[..., 0].expand(logits.shape[:3]), -torch.inf
    )
    return weights @ v, lse


def positions(
    batch: int, rows: int, keys: int, key_start: Starts, q_start: Starts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of query rows `[B, Tq]` and keys `[B, Tk]`, counted from each batch row's first
    real key."""
    first = torch.tensor(key_start or [0] * batch)[:, None]
    query = torch.tensor([keys - rows] * batch if q_start is None else q_start)[:, None]
    return query + torch.arange(rows) - first, torch.arange(keys) - first


def causal(
    batch: int,
    rows: int,
    keys: int,
    key_start: Starts = None,
    q_start: Starts = None,
    sliding: int | None = None,
) -> torch.Tensor:
    """The keys in sight of each row, `[B, 1, Tq, Tk]`: dense attention's mask."""
    row, key = positions(batch, rows, keys, key_start, q_start)
    row, key = row[:, :, None], key[:, None, :]
    seen = (key >= 0) & (key <= row)
    if sliding is not None:
        seen &= key > row - sliding
    return seen[:, None]


def read_mask(
    mask: BlockMask,
    config: HiPConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    key_start: Starts = None,
    q_start: Starts = None,
    sliding: int | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """The keys that a sparse call reads, `[B, Hq, Tq, Tk]`, from the blocks it says it selected and
    the written rules:

    the sink rounded up to `block_k`; from `window` keys before the query block's first row, rounded
    down to `block_k` (`window` overrides: decode keeps it); the selected blocks; the dense tail of
    a prefill call; nothing out of sight.
    """
    (batch, heads, rows, _), keys, bk = q.shape, k.shape[2], config.block_k
    row_at, key_at = positions(batch, rows, keys, key_start, q_start)
    sink = (config.sink + bk - 1) // bk * bk
    out = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
    for b in range(batch):
        row = max(0, -int(row_at[b, 0]))  # the first that is no padding
        decoding = rows - row <= DECODE_ROWS
        if (mask.first[b] < 0).all():  # this sequence is dense, others of the batch are not
            out[b] = True
            continue
        while row < rows:
            first, at = int(row_at[b, row]), key_at[b]
            size = 1 if decoding else config.block_q - first % config.block_q
            start = max(0, first - config.window) // bk * bk if window is None else window
            always = (at < sink) | (at >= start)
            (block,) = (mask.first[b] == first).nonzero()[0].tolist()
            for head in range(heads):
                shared = head * mask.indices.shape[1] // heads
                chosen = mask.indices[b, shared, block, : mask.counts[b, shared, block]].long()
                assert (chosen.diff() > 0).all(), (
                    f"blocks of query block {block} are not sorted and unique: {chosen}"
                )
                out[b, head, row : row + size] = always | torch.isin(
                    at.div(bk, rounding_mode="floor"), chosen
                )
            row += size
        if not decoding:
            out[b, :, max(0, rows - config.dense_tail) :] = True
    return out & causal(batch, rows, keys, key_start, q_start, sliding)


def sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: HiPConfig,
    key_start: Starts = None,
    q_start: Starts = None,
    state: DecodeState | None = None,
    need_mask: bool = True,
    **fields: Any,
) -> Result:
    """An attention call that must take the sparse path, with log-sum-exp and mask."""
    problem = make_problem(q, k, v, key_start, q_start, **fields)
    result = attend(problem, config, None, state, need_lse=True, need_mask=need_mask)
    assert result.path == "sparse", result.reason
    assert (result.mask is not None) == need_mask
    return result


def make_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_start: Starts = None,
    q_start: Starts = None,
    **fields: Any,
) -> AttentionProblem:
    """An `AttentionProblem` without the checks of `hip_attention`."""
    starts = [None if x is None else torch.tensor(x) for x in (key_start, q_start)]
    return AttentionProblem(
        q, k, v, make_spans(q, k, *starts), **{"scale": q.shape[-1] ** -0.5, **fields}
    )


def assert_near(
    got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5, what: str = "out"
) -> None:
    """Fail where `got` misses `want`, and say where and how far. Infinities must be in the same
    places."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} is not {tuple(want.shape)}"
    got, want = got.double(), want.double()
    miss = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf)
    worst = int(miss.argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), miss.shape)]
    message = f"{what}{where}: {got.flatten()[worst]} is not {want.flatten()[worst]}"
    assert miss.max() <= tolerance, f"{message}, off by {miss.max():.3g} > {tolerance}"


def assert_as_exact_as(
    got: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    **fields: Any,
) -> None:
    """The error against float64 is at most twice that of plain attention computed in q's own
    dtype."""
    want, _ = eager(q, k, v, visible, **fields)
    plain, _ = eager(q, k, v, visible, dtype=q.dtype, **fields)
    assert_near(got, want, 2 * float((plain - want).abs().max()) + 1e-12)


# sink of one block: within a sliding window it stays in sight as long as its block does
FEATURES = [
    dict(),
    dict(softcap=2.0),
    dict(sinks=True),
    dict(sliding_window=50),
    dict(scale=0.1, softcap=5.0, sinks=True, sliding_window=61),
]


def features(given: dict[str, Any], q: torch.Tensor) -> tuple[dict[str, Any], int | None]:
    """Arguments of an attention call, and the sliding window apart from them."""
    fields = dict(given)
    if fields.pop("sinks", False):
        fields["sinks"] = torch.linspace(-2, 3, q.shape[1]).to(q.dtype)
    return fields, fields.pop("sliding_window", None)
