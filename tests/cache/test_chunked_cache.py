"""Chunked prefill and decode on a paged cache: what one shot gives, in memory that does not grow
with the context."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import Allocations, allocations
from families import make_batch, make_model, paths
from transformers import LlamaConfig

from hip_hf import HiPCache, HiPConfig, workers
from hip_hf import config as settings
from hip_hf.attention import attend
from hip_hf.cache import pool
from hip_hf.cache.pages import PagedTensor
from hip_hf.integration import paged_layer
from hip_hf.methods import pyramid
from hip_hf.problem import AttentionProblem, make_spans

CHUNK = 128
# One key in 64 of 4,096 tokens makes this sample: it does not grow any more.
CONFIG = HiPConfig(
    block_k=4,
    budget=64,
    window=32,
    sink=16,
    beam=2,
    rescore=3,
    dense_below=0,
    dense_tail=0,
    options={"sample": 48},
)


@pytest.fixture(autouse=True)
def in_this_thread(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    threads(1)
    monkeypatch.setattr(workers.scratch, "buffers", {})


@pytest.mark.parametrize("chunk", [32, 50])
def test_generate_in_chunks_gives_the_tokens_of_one_shot(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a covering budget at any chunk; left-padded, pages smaller than the chunks."""
    monkeypatch.setattr(paged_layer, "PAGE", 24)
    model = make_model("llama", budget=1024)
    batch = make_batch([120, 87])
    with torch.no_grad():
        whole, parts = (
            model.generate(**batch, do_sample=False, max_new_tokens=6, prefill_chunk_size=size)
            for size in (None, chunk)
        )
    assert torch.equal(parts, whole)


def peak_of(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that lived at once during a call, beyond those before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    assert events
    return max(
        itertools.accumulate(
            event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
        )
    )


def used(cache: HiPCache) -> int:
    """Bytes of the pages that hold tokens, and of the summaries written."""
    total = 0
    for layer in cache.paged:
        assert layer.pool is not None
        total += layer.pool.bytes(layer.pool.used)
        summaries = layer.hip_state.rows[0].pyramid
        for level, table in enumerate(summaries.levels):
            total += table[:, : summaries.count(level)].numel() * table.element_size()
    return total


def test_a_prompt_in_chunks_needs_little_beside_its_cache_and_pyramid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through `generate`: the peak beyond the pages and summaries that are used, and a few integers
    a token. What waits to be used is bounded, here to what these lengths reach. (A dense tail has
    tiles of its own, which grow up to `LOGITS_AT_ONCE`.)"""
    monkeypatch.setattr(pool, "MOST_SPARE", 8)
    monkeypatch.setattr(pyramid, "MOST_SPARE", 32)
    monkeypatch.setattr(
        settings, "SEARCHED_KEYS", 512
    )  # and with it what is looked at whole: twice as much at most
    model, extra = make_model("llama", budget=64, window=64, sink=16, block_q=64), {}
    for tokens in (2048, 8192):
        ids, cache = make_batch([tokens])["input_ids"], HiPCache(model.config)
        model.config.max_position_embeddings = tokens + 2
        options = dict(
            do_sample=False, max_new_tokens=2, prefill_chunk_size=512, past_key_values=cache
        )
        workers.scratch.buffers.clear()
        with torch.no_grad():
            mask = torch.ones_like(ids)
            peak = peak_of(
                lambda ids=ids, mask=mask, options=options: model.generate(
                    ids, attention_mask=mask, **options
                )
            )
        assert paths(model) == ["sparse", "sparse"]
        extra[tokens] = peak - used(cache)
    # ids, masks and positions come as integers of eight bytes, some of them twice; a token's keys
    # and values are 512 bytes
    integers = 64 * (8192 - 2048)
    assert extra[8192] <= 1.05 * extra[2048] + integers, extra


@pytest.mark.parametrize("first", [512, 16384])
def test_what_waits_to_be_used_is_bounded(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pages and of summaries, also when one token follows a prompt that was read at once."""
    monkeypatch.setattr(pool, "MOST_SPARE", 32)
    monkeypatch.setattr(pyramid, "MOST_SPARE", 64)
    layer = layer_of(first + 3 * CHUNK)
    assert layer.pool is not None
    for rows in (1, 700):
        attention(layer, *new_tokens(layer, rows))()
        assert (
            0
            <= len(layer.pool.ref_count) - layer.pool.used
            <= min(pool.MOST_SPARE, layer.pool.used)
        )
        summaries = layer.hip_state.rows[0].pyramid
        for level, table in enumerate(summaries.levels):
            assert table.shape[1] - summaries.count(level) <= min(
                pyramid.MOST_SPARE, max(1, summaries.count(level))
            )


def layer_of(tokens: int) -> paged_layer.PagedLayer:
    """A paged layer of one key head that holds random keys and has seen two chunks attended to."""
    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = "hip"
    layer: paged_layer.PagedLayer = HiPCache(config).paged[0]
    x = torch.randn(1, 1, tokens - 3 * CHUNK, 16)
    layer.update(x, x)
    for _ in range(2):
        attention(layer, *new_tokens(layer, CHUNK))()
    return layer


def new_tokens(layer: paged_layer.PagedLayer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(1, 1, count, 16)
    keys, values = layer.update(x, x)
    assert isinstance(keys, PagedTensor)
    return keys, values


def attention(
    layer: paged_layer.PagedLayer, keys: torch.Tensor, values: torch.Tensor
) -> Callable[[], None]:
    """The attention call of the newest tokens; it must be sparse."""
    q = torch.randn(1, 2, layer.length - seen(layer), 16)
    problem = AttentionProblem(q, keys, values, make_spans(q, keys), 0.25)

    def call() -> None:
        assert attend(problem, CONFIG, None, layer.hip_state).path == "sparse"

    return call


def seen(layer: paged_layer.PagedLayer) -> int:
    row = layer.hip_state.rows.get(0)
    return layer.length - CHUNK if row is None else row.position


@pytest.mark.parametrize("rows", [CHUNK, 1])
def test_a_chunk_or_a_step_takes_memory_independent_of_the_context(rows: int) -> None:
    spent: dict[int, Allocations] = {}
    for tokens in (4096, 32768):
        layer = layer_of(tokens)
        spent[tokens] = allocations(attention(layer, *new_tokens(layer, rows)))
    assert spent[32768].largest <= 1.1 * spent[4096].largest
    # the search has a few levels more, the block table is longer by a number a page
    assert spent[32768].total <= 1.6 * spent[4096].total


def test_appending_a_token_allocates_nothing_that_grows() -> None:
    spent = {}
    for tokens in (4096, 32768):
        layer = layer_of(tokens)
        new_tokens(layer, 1)
        x = torch.randn(1, 1, 1, 16)
        spent[tokens] = allocations(lambda layer=layer, x=x: layer.update(x, x)).total
    assert spent[32768] == spent[4096]
