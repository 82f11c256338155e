"""Dense rows of a cache whose pages lie in several pieces of memory: long pieces are read where
they lie, short ones together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_model
from helpers import assert_near
from torch.nn.functional import scaled_dot_product_attention

from hip_hf import HiPCache, HiPConfig
from hip_hf.attention import attend
from hip_hf.backends.torch import block_sparse
from hip_hf.cache.pages import Store
from hip_hf.problem import AttentionProblem, make_spans

pytestmark = pytest.mark.fast

DENSE = HiPConfig(method="dense")
TOKENS = (640, 256, 200)  # of each piece, and a few rows at the end


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each read that was a copy."""
    seen: list[int] = []
    read = Store.read

    def watched(self: Store, *args: Any) -> torch.Tensor:
        found = read(self, *args)
        if found.untyped_storage().data_ptr() not in [
            arena.untyped_storage().data_ptr() for arena in self.arenas
        ]:
            seen.append(found.shape[1])
        return found

    monkeypatch.setattr(Store, "read", watched)
    return seen


@pytest.mark.parametrize("least", [64, 4096])
@pytest.mark.parametrize("rows", [1, 5, 80])
def test_pieces_are_copied_only_where_they_are_short(
    least: int, rows: int, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a chunk of a prompt, 80 rows, that ends with the last piece; its own keys lie in one."""
    monkeypatch.setattr(block_sparse, "KEYS_OF_A_PIECE", least)
    layer = HiPCache(make_model("llama").config).layers[0]
    for tokens in TOKENS:
        keys, values = layer.update(torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16))
    assert len(layer.pool.keys.arenas) == len(TOKENS)
    q = torch.randn(1, 4, rows, 16)
    found = attend(
        AttentionProblem(q, keys, values, make_spans(q, keys), 0.25), DENSE, need_lse=True
    ).out
    assert (copied == []) is (least == 64)
    k, v = keys.dense(), values.dense()
    length = k.shape[2]
    seen = torch.arange(length) <= torch.arange(length - rows, length)[:, None]
    assert_near(found, scaled_dot_product_attention(q, k, v, seen, scale=0.25, enable_gqa=True))
