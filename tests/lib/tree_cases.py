"""Calls of the tree search, held block by block to its plain twin (`hip_hf/methods/naive.py`)."""

from __future__ import annotations

import itertools
from typing import Any

import brute
import torch
from helpers import DECODE_ROWS, make_qkv, sparse

from hip_hf.config import HiPConfig
from hip_hf.methods.base import options_of
from hip_hf.methods.need import Options
from hip_hf.state import DecodeState


def layout(
    config: HiPConfig, rows: int, keys: int, sliding: int | None = None
) -> list[tuple[range, int, int]]:
    """Of every query block of a call: its rows' positions, and the range of its candidates in key
    blocks, by the written rules."""
    bk, first, found = config.block_k, keys - rows, []
    size = 1 if rows <= DECODE_ROWS else config.block_q
    for at, block in itertools.groupby(range(first, keys), key=lambda p: p // size):
        inside = list(block)
        oldest = 0 if sliding is None else max(0, inside[0] - sliding + 1) // bk
        window = max(max(0, inside[0] - config.window) // bk, oldest)
        found.append(
            (
                range(inside[0], inside[-1] + 1),
                min(max(-(-config.sink // bk), oldest), window),
                window,
            )
        )
        assert inside[0] // size == at
    return found


def expected(
    config: HiPConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    softcap: float | None = None,
    scale: float | None = None,
    sliding: int | None = None,
    sinks: torch.Tensor | None = None,
) -> dict[tuple[int, int], list[int]]:
    """Selected blocks by (head of the mask, query block)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups, rows, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    found = {}
    for head in range(k.shape[1] if config.group_shared else q.shape[1]):
        heads = (
            slice(head * groups, (head + 1) * groups)
            if config.group_shared
            else slice(head, head + 1)
        )
        queries, own_sinks = q[0, heads], None if sinks is None else sinks[heads].tolist()
        own = k[0, head if config.group_shared else head // groups]
        for n, (block, low, high) in enumerate(layout(config, rows, keys, sliding)):
            if high - low <= config.budget // config.block_k:
                found[head, n] = list(range(low, high))
                continue
            own_rows = torch.stack([queries[:, p - (keys - rows)] for p in block])
            options = options_of(config, Options)
            bounds = (low, high, scale, softcap, options.weight, options.onward)
            search = brute.Search(config, own, [], *bounds)
            if config.vote == "sampled":
                search.votes = brute.sampled(own_rows, config.query_stride)
            else:
                logit = lambda row, key, search=search: search.capped(float(row @ key))  # noqa: E731
                given = (block[0], low, high, logit, own_sinks, sliding, options.sample)
                search.votes, search.walking = brute.by_need(config, own, own_rows, *given)
            found[head, n] = search.run()
    return found


def selected(
    config: HiPConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **fields: Any
) -> dict[tuple[int, int], list[int]]:
    mask = sparse(q, k, v, config, **fields).mask
    assert mask is not None
    heads, blocks = mask.counts.shape[1:]
    return {
        (h, n): mask.indices[0, h, n, : mask.counts[0, h, n]].tolist()
        for h in range(heads)
        for n in range(blocks)
    }


def check(
    config: HiPConfig,
    tokens: int,
    rows: int | None = None,
    softcap: float | None = None,
    keep: bool = False,
    **shape: int,
) -> None:
    """`keep`: with a state, so that a step of one row selects for the steps after it."""
    q, k, v = make_qkv(tokens, rows, dtype=torch.float64, **shape)
    got = selected(config, q, k, v, softcap=softcap, state=DecodeState() if keep else None)
    want = expected(config, q, k, softcap)
    wrong = {key: (got.get(key), want[key]) for key in want if got.get(key) != want[key]}
    assert not wrong, f"(head, query block): (got, want) {wrong}"
    assert got.keys() == want.keys()
    assert any(len(blocks) == config.budget // config.block_k for blocks in got.values()), (
        "no tree was searched"
    )
