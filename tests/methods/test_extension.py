"""Positions given at attention time, each rule against a plain implementation of it: loops, complex
numbers, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, eager, make_problem, make_qkv, read_mask, small, sparse
from with_rope import DIM, EXTENDED, check_selection, positions, product

from hip_hf import HiPConfig, hip_attention
from hip_hf.attention import attend
from hip_hf.config import REPRESENTATIVES
from hip_hf.methods.base import method_of
from hip_hf.registry import METHODS
from hip_hf.rope import Rope
from hip_hf.state import DecodeState


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    distance: dict[tuple[int, int], int],
    by: Rope,
) -> torch.Tensor:
    """Rows of one head: q `[n, D]`, k `[T, D]`, v `[T, Dv]`, seen `[n, T]`; the distance of every
    pair that is seen."""
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for i in range(len(q)):
        keys = seen[i].nonzero().flatten().tolist()
        logits = (
            torch.tensor(
                [product(q[i], k[j], distance[i, j], by) for j in keys], dtype=torch.float64
            )
            * q.shape[1] ** -0.5
        )
        out[i] = torch.softmax(logits, 0) @ v[keys]
    return out


def places(
    seen: torch.Tensor, config: HiPConfig, first: int, trained: int, rows: int
) -> dict[tuple[int, int], int]:
    """Distances by the streaming rule, for rows that begin at position `first`: what a query block
    reads is numbered consecutively, up to its last row's key; no key counts as farther than was
    trained."""
    distance, row = {}, 0
    while row < rows:
        size = 1 if rows <= 16 else config.block_q - (first + row) % config.block_q
        last = min(row + size, rows) - 1
        listed = seen[last].nonzero().flatten().tolist()
        place = {key: at for at, key in enumerate(listed)}
        for i in range(row, last + 1):
            own = place[first + i]
            distance |= {
                (i, j): min(own - place[j], trained - 1)
                for j in seen[i].nonzero().flatten().tolist()
            }
        row = last + 1
    return distance


def check_streaming(config: HiPConfig, tokens: int, rows: int, trained: int, **fields: Any) -> None:
    q, k, v = make_qkv(tokens, rows, dtype=torch.float64, heads=1)
    where = positions(trained, **fields)
    result = sparse(q, k, v, config, positions=where)
    assert result.mask is not None
    seen = read_mask(result.mask, config, q, k)
    for head in range(q.shape[1]):
        distance = places(seen[0, head], config, tokens - rows, trained, rows)
        assert max(distance.values()) < trained
        assert any(d != tokens - rows + i - j for (i, j), d in distance.items()), (
            "nothing was moved"
        )
        want = attention(q[0, head], k[0, 0], v[0, 0], seen[0, head], distance, where.rope)
        assert_near(result.out[0, head], want, 1e-9, f"head {head}")


@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.parametrize("fields", [{}, {"dim": 8}, {"scaling": 1.3}, {"dim": 12, "scaling": 0.7}])
def test_attention_at_streaming_positions(rows: int, fields: dict[str, Any], poison: None) -> None:
    check_streaming(small(**EXTENDED), 131, rows, 64, **fields)


@pytest.mark.parametrize("trained", [36, 40, 52])
def test_what_rounding_puts_beyond_the_trained_length_counts_as_farthest(trained: int) -> None:
    """`sink + budget + window` is 36; rounded to blocks, a row reads up to 54 keys."""
    check_streaming(small(**EXTENDED), 131, 37, trained)


@pytest.mark.parametrize("group_shared", [True, False])
@pytest.mark.parametrize("chunk_indexed", [True, False])
def test_streaming_positions_whatever_the_selection(
    group_shared: bool, chunk_indexed: bool
) -> None:
    config = small(**EXTENDED, group_shared=group_shared)
    q, k, v = make_qkv(150, 40, dtype=torch.float64)
    where = positions(64, chunk_indexed)
    result = sparse(q, k, v, config, positions=where)
    assert result.mask is not None
    seen = read_mask(result.mask, config, q, k)
    for head in range(4):
        distance = places(seen[0, head], config, 110, 64, 40)
        want = attention(
            q[0, head], k[0, head // 2], v[0, head // 2], seen[0, head], distance, where.rope
        )
        assert_near(result.out[0, head], want, 1e-9)


@pytest.mark.parametrize("rows", [1, 7, 33, 131])
@pytest.mark.parametrize("trained", [24, 64, 200])
def test_dense_rows_clamp_distances(rows: int, trained: int, poison: None) -> None:
    q, k, v = make_qkv(131, rows, dtype=torch.float64, heads=1, groups=1)
    where = positions(trained, scaling=1.2)
    config = HiPConfig(method="dense", extend="streaming")
    result = attend(make_problem(q, k, v, positions=where), config, need_lse=rows == 33)
    assert result.path == "dense"
    seen = torch.ones(rows, 131, dtype=torch.bool).tril(131 - rows)
    distance = {
        (i, j): min(131 - rows + i - j, trained - 1)
        for i in range(rows)
        for j in range(131 - rows + i + 1)
    }
    want = attention(q[0, 0], k[0, 0], v[0, 0], seen, distance, where.rope)
    assert_near(result.out[0, 0], want, 1e-9)


def test_dense_tiles_are_cut_where_keys_become_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    from hip_hf.backends.torch import block_sparse

    q, k, v = make_qkv(131, 40, dtype=torch.float64)
    problem = make_problem(q, k, v, positions=positions(50))
    config = HiPConfig(method="dense", extend="streaming")
    whole = attend(problem, config, need_lse=True)
    monkeypatch.setattr(block_sparse, "LOGITS_AT_ONCE", 1)  # a tile is then as many keys as rows
    tiled = attend(problem, config, need_lse=True)
    assert whole.lse is not None
    assert tiled.lse is not None
    assert_near(tiled.out, whole.out, 1e-12)
    assert_near(tiled.lse, whole.lse, 1e-12)


@pytest.mark.parametrize("chunk_indexed", [True, False])
@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_selection_for_every_representative(
    representative: str, chunk_indexed: bool, poison: None
) -> None:
    check_selection(
        small(**EXTENDED, representative=representative), 163, 35, positions(128, chunk_indexed)
    )


@pytest.mark.parametrize("chunk_indexed", [True, False])
@pytest.mark.parametrize("trained", [40, 128])
@pytest.mark.parametrize(
    "fields",
    [{"vote": "sampled"}, {"query_stride": 8}, {"query_stride": 8, "options": {"sample": 4}}],
)
def test_selection_for_choices_of_votes(
    fields: dict[str, Any], trained: int, chunk_indexed: bool, poison: None
) -> None:
    """40 positions are fewer than a row reads: there some of the sink counts as nearer than its
    place says."""
    check_selection(
        small(**EXTENDED, **fields), 163, 35, positions(trained, chunk_indexed, scaling=1.2)
    )


@pytest.mark.parametrize("chunk_indexed", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{"rescore": 2}, {"rescore": 4, "beam": 1}, {"score": "max"}, {"coarsest": 8, "sink": 0}],
)
def test_selection_for_shapes_of_the_tree(fields: dict[str, Any], chunk_indexed: bool) -> None:
    check_selection(
        small(**{**EXTENDED, "budget": 8, **fields}),
        163,
        19,
        positions(128, chunk_indexed, scaling=1.2),
    )


@pytest.mark.parametrize("trained", [44, 52])
def test_chunks_beyond_the_trained_length_are_equally_far(trained: int) -> None:
    config = small(**EXTENDED)
    assert (
        trained - 1 - config.window - config.block_k - config.block_q < 32 - 9
    )  # chunks before the window
    check_selection(config, 163, 35, positions(trained, True, dim=12))


def test_selection_in_decode() -> None:
    check_selection(small(**EXTENDED), 163, 3, positions(64, True))


@pytest.mark.parametrize("method", [method for method in METHODS if method_of(method).extends])
@pytest.mark.parametrize("tokens", [33, 131])
def test_a_covering_budget_is_dense_attention_within_the_trained_length(
    method: str, tokens: int
) -> None:
    config = small(**{**EXTENDED, "budget": 128, "window": 128}, method=method)
    q, k, v = make_qkv(tokens)
    where = positions(512, scaling=1.1)
    got = hip_attention(q, k, v, config=config, positions=where)
    at = torch.arange(tokens)
    angles = at[:, None] * where.rope.inv_freq
    full_q, full_k = (rotated(x.double(), angles.double(), 1.1) for x in (q, k))
    want, _ = eager(full_q, full_k, v, torch.ones(tokens, tokens, dtype=torch.bool).tril())
    assert_near(got, want, 1e-4)


def rotated(x: torch.Tensor, angles: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """As models rotate: all at their own positions; angles `[T, D / 2]`."""
    cos, sin = (
        torch.cat([f(angles), f(angles)], -1).to(x.dtype) * scaling for f in (torch.cos, torch.sin)
    )
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["streaming", "dense"])
def test_as_exact_as_the_model_in_its_dtype(method: str, dtype: torch.dtype) -> None:
    config = small(extend="streaming", method=method, sink=64, window=256, block_k=64, budget=64)
    q, k, v = make_qkv(200, dtype=dtype)
    where = positions(512)
    got = hip_attention(q, k, v, config=config, positions=where)
    seen, at = torch.ones(200, 200, dtype=torch.bool).tril(), torch.arange(200)[:, None]
    angles, exact = (
        at * where.rope.inv_freq,
        at.double() * where.rope.inv_freq.double(),
    )  # models compute them in fp32
    plain = eager(rotated(q, angles), rotated(k, angles), v, seen, dtype=dtype)[0]
    want = eager(rotated(q.double(), exact), rotated(k.double(), exact), v, seen)[0]
    assert_near(got, want, 2 * float((plain - want).abs().max()))


@pytest.mark.parametrize(
    ("method", "chunk_indexed"),
    [("hip", True), ("hip", False), ("staged", True), ("staged", False), ("streaming", False)],
)
def test_padding_chunks_and_steps_change_nothing(method: str, chunk_indexed: bool) -> None:
    """A padded row, a prompt in chunks and steps with kept state give what one call gives."""
    config = small(**EXTENDED, method=method, decode_refresh=1)
    q, k, v = make_qkv(150, dtype=torch.float64)
    where = positions(64, chunk_indexed)
    once = hip_attention(q, k, v, config=config, positions=where)
    pad = torch.full((1, 1, 11, DIM), torch.nan, dtype=torch.float64)
    padded = [torch.cat([pad.expand(-1, x.shape[1], -1, -1), x], dim=2) for x in (q, k, v)]
    got = hip_attention(*padded, config=config, positions=where, key_start=torch.tensor([11]))
    assert_near(got[:, :, 11:], once, 1e-9)
    state, parts = DecodeState(), []
    for first, last in [(0, 64), (64, 144), *((i, i + 1) for i in range(144, 150))]:
        part = hip_attention(
            q[:, :, first:last],
            k[:, :, :last],
            v[:, :, :last],
            config=config,
            positions=where,
            state=state,
        )
        parts.append(part)
    assert_near(torch.cat(parts, 2)[:, :, :144], once[:, :, :144], 1e-9)
    for i in range(144, 150):
        alone = hip_attention(
            q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], config=config, positions=where
        )
        assert_near(parts[i - 142], alone, 1e-9)


def test_a_kept_selection_is_placed_anew_at_every_step() -> None:
    config = small(**EXTENDED, decode_refresh=4)
    q, k, v = make_qkv(140, dtype=torch.float64, heads=1)
    where, state = positions(64), DecodeState()
    hip_attention(
        q[:, :, :120], k[:, :, :120], v[:, :, :120], config=config, positions=where, state=state
    )
    windows = []
    for i in range(120, 130):
        now = make_problem(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], positions=where)
        result = attend(now, config, None, state, need_mask=True)
        window = state.rows[0].selection.window_start
        windows.append(window)
        seen = read_mask(result.mask, config, now.q, now.k, window=window)
        for head in range(2):
            distance = places(seen[0, head], config, i, 64, 1)
            want = attention(
                now.q[0, head], now.k[0, 0], now.v[0, 0], seen[0, head], distance, where.rope
            )
            assert_near(result.out[0, head], want, 1e-9)
    assert len(set(windows)) < len(windows)


def test_nothing_depends_on_later_rows() -> None:
    config = small(**EXTENDED)
    q, k, v = make_qkv(150)
    where = positions(64, True)
    once = hip_attention(q, k, v, config=config, positions=where)
    for x in (q, k, v):
        x[:, :, 128:] = torch.randn_like(x[:, :, 128:])
    again = hip_attention(q, k, v, config=config, positions=where)
    assert torch.equal(once[:, :, :128], again[:, :, :128])
    assert not torch.equal(once, again)


BAD = [
    (dict(config=HiPConfig(extend="streaming")), "positions: got None, allowed: Positions"),
    (dict(config=HiPConfig(), positions=positions()), "allowed: None without config.extend"),
    (dict(config=small(**EXTENDED), positions=7), "positions: got int"),
    (
        dict(config=small(**EXTENDED), positions=positions(35)),
        "got 36 keys and block_q=16, allowed .* trained 35",
    ),
    (dict(config=small(**EXTENDED, block_q=65), positions=positions(64)), "block_q=65"),
    (
        dict(config=small(**EXTENDED), positions=positions(64, dim=32)),
        "positions.rope: got 32 .* head dim 16",
    ),
    (
        dict(config=small(**EXTENDED), positions=positions(64), sliding_window=40),
        "sliding_window: got 40",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hip_attention(*make_qkv(40), **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extend": "rope"}, r"extend: got 'rope', allowed: None \| streaming"),
        (
            {"extend": "streaming", "method": "vertical_slash"},
            r"method: got 'vertical_slash', allowed: with `extend`: hip \|",
        ),
        ({"extend": "streaming", "method": "hyper"}, "method: got 'hyper'"),
        ({"extend": "streaming", "delta": 64}, "delta: got 64, allowed: None with `extend`"),
        ({"layers": {1: {"extend": "streaming"}}}, "`extend`, which holds for all layers"),
    ],
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiPConfig(**fields)


def test_gradients_are_refused() -> None:
    q, k, v = make_qkv(40)
    with pytest.raises(ValueError, match="extend: got 'streaming' where gradients"):
        hip_attention(q.requires_grad_(), k, v, config=small(**EXTENDED), positions=positions())
