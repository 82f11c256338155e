"""Chunked prefill and decode on a paged cache: what one shot gives, in memory that does not grow with the context."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from test_memory import Allocations, allocations
from transformers import LlamaConfig

from hip_hf import HiPCache, HiPConfig
from hip_hf.attention import attend
from hip_hf.cache import hip_cache
from hip_hf.paged import PagedTensor
from hip_hf.problem import AttentionProblem, make_spans
from hip_hf.reference import workers

CHUNK = 128
CONFIG = HiPConfig(block_k=4, budget=64, window=32, sink=16, dense_below=0, dense_tail=0)


@pytest.fixture(autouse=True)
def in_this_thread(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    threads(1)
    monkeypatch.setattr(workers.scratch, "buffers", {})


@pytest.mark.parametrize("chunk", [32, 50])
def test_generate_in_chunks_gives_the_tokens_of_one_shot(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a covering budget at any chunk; left-padded, pages smaller than the chunks."""
    monkeypatch.setattr(hip_cache, "PAGE", 24)
    model = make_model("llama", budget=1024)
    batch = make_batch([120, 87])
    with torch.no_grad():
        whole, parts = (
            model.generate(**batch, do_sample=False, max_new_tokens=6, prefill_chunk_size=size) for size in (None, chunk)
        )
    assert torch.equal(parts, whole)


def peak_of(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that lived at once during a call, beyond those before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_a_prompt_in_chunks_needs_little_beside_its_cache_and_pyramid() -> None:
    """Through `generate`: the peak beyond what the cache has allocated, and beyond a few integers a token. (A dense tail has
    tiles of its own, which grow up to `LOGITS_AT_ONCE`.)"""
    model, extra = make_model("llama", budget=64, window=64, sink=16, block_q=64), {}
    for tokens in (2048, 8192):
        ids, cache = make_batch([tokens])["input_ids"], HiPCache(model.config)
        model.config.max_position_embeddings = tokens + 2
        options = dict(do_sample=False, max_new_tokens=2, prefill_chunk_size=512, past_key_values=cache)
        workers.scratch.buffers.clear()
        with torch.no_grad():
            mask = torch.ones_like(ids)
            peak = peak_of(lambda ids=ids, mask=mask, options=options: model.generate(ids, attention_mask=mask, **options))
        assert paths(model) == ["sparse", "sparse"]
        slabs = [slab for layer in cache.paged for store in (layer.pool.keys, layer.pool.values) for slab in store.slabs]
        tables = [table for layer in cache.paged for table in layer.hip_state.rows[0].pyramid.levels]
        extra[tokens] = peak - sum(x.numel() * x.element_size() for x in [*slabs, *tables])
    # ids, masks and positions come as integers of eight bytes, some of them twice; a token's keys and values are 512 bytes
    integers = 64 * (8192 - 2048)
    assert extra[8192] <= 1.05 * extra[2048] + integers, extra


def layer_of(tokens: int) -> hip_cache.PagedLayer:
    """A paged layer of one key head that holds random keys and has seen two chunks attended to."""
    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = "hip"
    layer: hip_cache.PagedLayer = HiPCache(config).paged[0]
    x = torch.randn(1, 1, tokens - 3 * CHUNK, 16)
    layer.update(x, x)
    for _ in range(2):
        attention(layer, *new_tokens(layer, CHUNK))()
    return layer


def new_tokens(layer: hip_cache.PagedLayer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(1, 1, count, 16)
    keys, values = layer.update(x, x)
    assert isinstance(keys, PagedTensor)
    return keys, values


def attention(layer: hip_cache.PagedLayer, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], None]:
    """The attention call of the newest tokens; it must be sparse."""
    q = torch.randn(1, 2, layer.length - seen(layer), 16)
    problem = AttentionProblem(q, keys, values, make_spans(q, keys), 0.25)

    def call() -> None:
        assert attend(problem, CONFIG, None, layer.hip_state).path == "sparse"

    return call


def seen(layer: hip_cache.PagedLayer) -> int:
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
