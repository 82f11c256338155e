"""Calls of 2 to 16 rows (short questions, candidates, small chunks): every row selects for itself,
but the work is shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, make_problem, make_qkv, small, sparse
from transformers import PreTrainedConfig
from with_rope import positions

from hip_hf import HiPCache
from hip_hf.attention import attend
from hip_hf.backends.torch import sparse as sparse_path
from hip_hf.methods.hip import TreeSearch
from hip_hf.state import DecodeState

TOKENS = 160


def in_pages(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same keys and values as a paged cache hands them over, read in chunks that end within a
    page."""
    cache = HiPCache(PreTrainedConfig(num_hidden_layers=1))
    for part in (slice(0, 100), slice(100, None)):
        k_all, v_all = cache.update(k[:, :, part], v[:, :, part], 0)
    return k_all, v_all


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("rows", [2, 7, 16])
def test_what_rows_share_is_computed_once(
    rows: int, pad: int, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One search for all rows of a start level, sink and window once for all rows with the same
    window, the rest in one go."""
    config, (q, k, v) = small(), make_qkv(TOKENS, rows)
    searches, read, search, partial = [], [], TreeSearch._search, sparse_path.partial

    def counted(self: Any, heads: slice, blocks: Any, *given: Any) -> torch.Tensor:
        searches.append(len(blocks))
        return search(self, heads, blocks, *given)

    def parts(t: Any, blocks: Any, *given: Any, near: bool = True, **more: Any) -> Any:
        read.append((near, sum(block.rows for block in blocks), len(blocks)))
        return partial(t, blocks, *given, near=near, **more)

    monkeypatch.setattr(TreeSearch, "_search", counted)
    monkeypatch.setattr(sparse_path, "partial", parts)
    if paged:
        k, v = in_pages(k, v)
    result = attend(make_problem(q, k, v, [pad]), config, state=DecodeState())
    assert result.path == "sparse"
    windows = {
        max(0, TOKENS - rows + i - pad - config.window) // config.block_k for i in range(rows)
    }
    assert sum(searches) == rows
    assert len(searches) <= 2  # start levels
    assert len([1 for near, _, _ in read if near]) == len(windows)
    assert [part for part in read if not part[0]] == [(False, rows, rows)]
    assert sum(count for near, count, _ in read if near) == rows


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(group_shared=False),
        dict(vote="sampled"),
        dict(block_k=1, budget=8),
        dict(method="quest"),
        dict(method="oracle"),
        dict(method="staged"),
        dict(method="streaming"),
        dict(method="streaming", options={"recent": True}),
    ],
)
@pytest.mark.parametrize(
    "given",
    [
        dict(),
        dict(sliding_window=90),
        dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), softcap=2.0),
        dict(extended=True),
    ],
    ids=["plain", "sliding", "sinks", "extended"],
)
def test_each_row_is_the_step_that_it_would_be_alone(
    fields: dict[str, Any], given: dict[str, Any]
) -> None:
    """Output, log-sum-exp and selection, in rows that begin before the budget leaves anything out
    and go on behind that."""
    fields, given = dict(fields), dict(given)
    if given.pop("extended", False):
        if fields.get("method") == "quest":
            pytest.skip("tested by its search, hip")
        fields["extend"], given["positions"] = "streaming", positions(96)
    config = small(decode_refresh=1, **fields)
    for tokens in (config.sink + config.budget + config.window + 12, TOKENS):
        q, k, v = make_qkv(tokens, 16, dtype=torch.float64)
        whole = sparse(q, k, v, config, state=DecodeState(), **given)
        for row in range(16):
            end = tokens - 15 + row
            step = sparse(
                q[:, :, row : row + 1],
                k[:, :, :end],
                v[:, :, :end],
                config,
                state=DecodeState(),
                **given,
            )
            assert_near(whole.out[:, :, row : row + 1], step.out, 1e-12)
            assert_near(whole.lse[:, :, row : row + 1], step.lse, 1e-12)
            assert torch.equal(whole.mask.indices[:, :, row], step.mask.indices[:, :, 0])
            assert torch.equal(whole.mask.counts[:, :, row], step.mask.counts[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_default_a_few_rows_of_8k_tokens_read_them_together(dtype: torch.dtype) -> None:
    """Each would select for itself, which takes longer. A step, whose selection serves others too,
    is sparse. Candidates that must give the tokens of plain decoding (`decode_refresh=1`) are dense
    where that is."""
    q, k, v = make_qkv(8192, 16, heads=1, dtype=dtype)
    config = small(dense_below=None, budget=64, window=64)

    def path(rows: int, **fields: Any) -> str:
        problem = make_problem(q[:, :, 16 - rows :], k, v)
        return attend(
            problem, small(dense_below=None, budget=64, window=64, **fields), state=DecodeState()
        ).path

    assert config.decode_refresh > 1
    assert [path(rows) for rows in (1, 2, 7, 16)] == ["sparse", "dense", "dense", "dense"]
    assert len({path(rows, decode_refresh=1) for rows in (1, 2, 16)}) == 1
