"""The pyramid kernels against the torch pyramid (`methods/pyramid.py`): every summary, built at
once and appended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import small
from interpreter import DEVICE

from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.backends.triton.pyramid import KeyPyramid
from hip_hf.config import REPRESENTATIVES, HiPConfig
from hip_hf.geometry import Span
from hip_hf.methods.base import selector_for

pytestmark = pytest.mark.kernels


def pages_of(k: torch.Tensor, page_size: int) -> KeyValues:
    """`[B, H, T, D]` in pages of random order, the unused parts NaN."""
    batch, heads, tokens, dim = k.shape
    per_row = -(-tokens // page_size)
    order = torch.randperm(batch * per_row + 2)[: batch * per_row].view(batch, per_row)
    pages = torch.full((batch * per_row + 2, page_size, heads, dim), torch.nan, dtype=k.dtype)
    for b in range(batch):
        for i in range(per_row):
            part = k[b, :, i * page_size : (i + 1) * page_size].transpose(0, 1)
            pages[order[b, i], : len(part)] = part
    return KeyValues(pages.to(DEVICE), pages.to(DEVICE), order.int().to(DEVICE))


def fresh(config: HiPConfig, k: torch.Tensor, sequences: int, capacity: int) -> KeyPyramid:
    shape = (sequences, k.shape[1], k.shape[3], capacity)
    pyramid = KeyPyramid.empty(config, shape, k.new_empty(0, device=DEVICE))
    pyramid.table.fill_(torch.nan)
    pyramid.states.fill_(torch.nan)
    return pyramid


def extend(
    pyramid: KeyPyramid, kv: KeyValues, spans: list[Span], block_q: int, append: bool
) -> None:
    pyramid.extend(kv, Sequences.of(spans, torch.device(DEVICE)), block_q, append)


def needed(config: HiPConfig, span: Span, block_q: int) -> int:
    """Blocks before the window of the last query block."""
    last = span.end - 1
    first = max(span.position, last // block_q * block_q)
    return max(0, first - config.window) // config.block_k if span.rows else 0


def check(
    config: HiPConfig, pyramid: KeyPyramid, k: torch.Tensor, spans: list[Span], block_q: int
) -> None:
    """Each summary is within twice the rounding of its dtype of the float64 one, and nothing else
    was written."""
    table = pyramid.table.cpu()
    for s, span in enumerate(spans):
        blocks = needed(config, span, block_q)
        assert (pyramid.built[s] == blocks).all(), (pyramid.built[s], blocks)
        keys = k[span.batch, :, span.key_start : span.key_end]
        exact, plain = (
            selector_for(config).make_pyramid(dtype) for dtype in (torch.float64, k.dtype)
        )
        exact.extend(keys.double(), blocks)
        plain.extend(keys, blocks)
        written = torch.zeros(table.shape[2], dtype=torch.bool)
        for level in range(blocks.bit_length()):
            count = blocks >> level
            rows = torch.tensor([((2 * i + 1) << level) - 1 for i in range(count)])
            written[rows] = True
            want, same = exact.levels[level][:, :count], plain.levels[level][:, :count]
            got = table[s][:, rows]
            worst = (got.double() - want).abs().max()
            allowed = 2 * (same.double() - want).abs().max() + 1e-12
            assert worst <= allowed, f"sequence {s}, level {level}: off by {worst} > {allowed}"
        assert table[s][:, ~written].isnan().all(), "rows of incomplete chunks stay untouched"


def keys(
    tokens: int, batch: int = 1, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, dim).to(dtype)


def built_at_once(representative: str, **shape: Any) -> None:
    config, k = small(representative=representative, window=3), keys(415, **shape)
    spans = [Span(0, 0, 415, 0, 415, 0)]
    pyramid = fresh(config, k, 1, 415)
    extend(pyramid, KeyValues(k.to(DEVICE), k.to(DEVICE)), spans, config.block_q, append=False)
    check(config, pyramid, k, spans, config.block_q)


@pytest.mark.fast
@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_every_representative(representative: str) -> None:
    built_at_once(representative)


@pytest.mark.parametrize("representative", ["blend", "middle"])
@pytest.mark.parametrize(
    "shape", [dict(dtype=torch.bfloat16), dict(dtype=torch.float16), dict(dim=80, heads=1)]
)
def test_dtypes_and_head_dims(representative: str, shape: dict[str, Any]) -> None:
    built_at_once(representative, **shape)


@pytest.mark.parametrize("representative", ["blend", "middle"])
def test_appended_step_by_step(representative: str) -> None:
    """A prompt, a second chunk of it, then steps of one and of a few tokens that cross tiles; and
    after a crop."""
    config, k = small(representative=representative, block_k=2, budget=8, window=1), keys(331)
    pyramid, kv = fresh(config, k, 1, 400), KeyValues(k.to(DEVICE), k.to(DEVICE))
    end = 0
    for rows in (100, 90, 1, 1, 4, 1, 16, 60, 58):
        span = Span(0, 0, end + rows, 0, rows, end)
        extend(pyramid, kv, [span], 1, append=end >= 190)
        check(config, pyramid, k, [span], 1)
        end += rows
    pyramid.truncate(70)
    pyramid.table[:, :, 140:] = torch.nan
    for level in range(1, 9):  # what reaches beyond the crop is gone, wherever it lies
        rows = [((2 * i + 1) << level) - 1 for i in range(165 >> level) if (i + 1) << level > 70]
        pyramid.table[:, :, rows] = torch.nan
    k[:, :, 140:] = torch.randn_like(k[:, :, 140:])
    kv = KeyValues(k.to(DEVICE), k.to(DEVICE))
    span = Span(0, 0, 300, 0, 3, 297)
    extend(pyramid, kv, [span], 1, append=True)
    check(config, pyramid, k, [span], 1)


@pytest.mark.parametrize("representative", ["blend", "middle"])
@pytest.mark.parametrize("page_size", [0, 7, 16])
def test_sequences_padding_and_pages(representative: str, page_size: int) -> None:
    config = small(representative=representative, window=5, block_k=3, budget=12)
    k = keys(280, batch=3)
    spans = [Span(0, 11, 280, 0, 100, 169), Span(1, 0, 200, 0, 33, 167)]
    spans += [Span(1, 200, 280, 33, 113, 0), Span(2, 0, 0, 0, 0, 0)]
    kv = pages_of(k, page_size) if page_size else KeyValues(k.to(DEVICE), k.to(DEVICE))
    pyramid = fresh(config, k, 4, 280)
    extend(pyramid, kv, spans, config.block_q, append=False)
    check(config, pyramid, k, spans, config.block_q)


def test_reorder_and_truncate_sequence_by_sequence() -> None:
    config, k = small(window=0), keys(200, batch=2)
    spans = [Span(0, 0, 200, 0, 200, 0), Span(1, 0, 200, 0, 200, 0)]
    kv, pyramid = KeyValues(k.to(DEVICE), k.to(DEVICE)), fresh(config, k, 2, 300)
    extend(pyramid, kv, spans, config.block_q, append=False)
    pyramid.reorder(torch.tensor([1, 1, 0], device=DEVICE))
    check(config, pyramid, k, [spans[1], spans[1], spans[0]], config.block_q)
    pyramid.truncate(torch.tensor([3, 48, 0], dtype=torch.int32, device=DEVICE))
    assert pyramid.built[:, 0].tolist() == [3, 48, 0]
