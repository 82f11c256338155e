"""`hip-hf perplexity`: losses against one plain forward, chunks that change nothing, ranges,
intervals and ratios."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SMALL, refused, run, save_checkpoint
from families import VOCAB, make_model

from hip_hf.cli import perplexity as perplexity_command
from hip_hf.eval.measure.perplexity import (
    BLOCK,
    PerplexityPlan,
    interval,
    losses,
    range_row,
    read_losses,
)

TEXT = torch.randint(3, VOCAB - 1, (512,), generator=torch.Generator().manual_seed(1)).tolist()


def plain(model: Any) -> torch.Tensor:
    """Losses of one dense forward in float64, without a cache."""
    ids = torch.tensor([TEXT])
    model = model.double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        rows = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return -rows[:-1].gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("chunk", [128, 384, 512])
def test_losses_are_those_of_one_dense_forward(family: str, chunk: int) -> None:
    want = plain(make_model(family))
    for implementation, settings in (("eager", {}), ("hip", {"budget": 512})):
        found = losses(make_model(family, implementation, **settings), TEXT, chunk)
        assert found.shape == (511,)
        torch.testing.assert_close(found, want, atol=2e-3, rtol=0)


def test_chunks_change_nothing_where_keys_are_pruned() -> None:
    whole, parts = (losses(make_model("llama"), TEXT, chunk) for chunk in (512, 128))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)
    assert (whole - plain(make_model("llama"))).abs().max() > 1e-2  # pruned indeed


def test_what_is_read_is_one_sum_a_block() -> None:
    found = read_losses(make_model("llama"), TEXT, 256, sparse=True)
    loss = losses(make_model("llama"), TEXT, 256)
    assert found["sums"] == pytest.approx(
        [float(loss[:127].sum()), *loss[127:].view(3, BLOCK).sum(1).tolist()]
    )
    assert found["path"] == "sparse"
    assert 0 < found["read"] < 0.6


def test_rows_weigh_tokens_and_compare_on_the_same_ones() -> None:
    found = [{"sums": [127.0, 256.0, 384.0, 128.0], "read": 0.5, "path": "sparse"}]
    first = [{"sums": [127.0, 128.0, 128.0, 128.0], "read": 1.0, "path": "sdpa"}]
    row = range_row("x", 0, 512, 512, found, first)
    assert row["tokens"] == 511
    assert math.log(row["perplexity"]) == pytest.approx((127 + 256 + 384 + 128) / 511)
    assert math.log(row["ratio"]) == pytest.approx((128 + 256) / 511)
    half = 1.959964 * math.sqrt(sum((x - 1.75) ** 2 for x in (1, 2, 3, 1)) / 3) / 2
    assert math.log(row["high"] / row["perplexity"]) == pytest.approx(half, rel=1e-4)
    assert math.log(row["perplexity"] / row["low"]) == pytest.approx(half, rel=1e-4)
    middle = range_row("x", 128, 384, 512, found, first)
    assert (middle["tokens"], middle["read"]) == (256, None)
    assert math.log(middle["perplexity"]) == pytest.approx(2.5)
    assert interval([1.0]) is None


def test_ranges_of_positions_double() -> None:
    assert PerplexityPlan({}, 8192).edges == [1024, 2048, 4096, 8192]
    assert PerplexityPlan({}, 384).edges == [384]
    assert PerplexityPlan({}, 512).edges == [128, 256, 512]
    assert PerplexityPlan({}, 1024, texts=3).text(list(range(2000)), 2)[0] == 976


def test_command(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    picture = tmp_path / "ppl.png"
    arguments = [
        model,
        "--document",
        text,
        "--tokens",
        "1K",
        "--chunk",
        "256",
        "--plot",
        str(picture),
    ]
    shown = run(
        perplexity_command.main, *arguments, "--settings", "dense", "--settings", json.dumps(SMALL)
    )
    rows = shown["rows"]
    assert [(row["from"], row["to"]) for row in rows[:5]] == [
        (0, 1024),
        (0, 128),
        (128, 256),
        (256, 512),
        (512, 1024),
    ]
    dense, sparse = rows[0], rows[5]
    assert (dense["ratio"], dense["read"], dense["path"]) == (1, 1, "sdpa")
    assert (dense["ratio_low"], dense["ratio_high"]) == (1, 1)
    assert sparse["path"] == "sparse"
    assert sparse["read"] < 0.3
    assert sparse["low"] < sparse["perplexity"] < sparse["high"]
    assert sparse["ratio"] == pytest.approx(sparse["perplexity"] / dense["perplexity"])
    parts = [math.log(row["perplexity"]) * row["tokens"] for row in rows[6:10]]
    assert math.log(sparse["perplexity"]) * sparse["tokens"] == pytest.approx(sum(parts))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--tokens", "1000"), "--tokens: got 1000, allowed: a multiple of 128"),
        (("--chunk", "100"), "--chunk: got 100"),
        (("--tokens", "1K,2K"), "one length"),
        (("--tokens", "1G"), "token counts"),
        (("--tokens", "64K"), "at most the"),
        (("--settings", "nonsense"), "nonsense"),
        (("--report", "/nowhere/report.html"), "--report: got '/nowhere/report.html'"),
    ],
)
def test_refusals(arguments: tuple[str, ...], what: str, tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    assert what in " ".join(
        refused(perplexity_command.main, model, "--document", text, *arguments).split()
    )
