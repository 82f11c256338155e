"""`HiPCache`: the tokens of a dynamic cache, whatever `generate` does to it, and no copy of the
context on the way."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hip_hf
from hip_hf import HiPCache
from hip_hf.cache.pages import PagedTensor
from hip_hf.integration import paged_layer
from hip_hf.integration.cache_layers import Stateful

FAMILIES = ("llama", "mistral", "mistral_full", "qwen3", "gemma2")
SLIDING = {
    "mistral": 2,
    "gemma2": 1,
}  # of two layers; these are dense, and keep their window themselves
CHECKPOINT = Path(hip_hf.__file__).parent / "assets" / "checkpoint"


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages for short contexts, of a size that key blocks straddle."""
    monkeypatch.setattr(paged_layer, "PAGE", 20)


class ConcatenatingLayer(Stateful, DynamicLayer):
    """Transformers' own dynamic layer, with the state that a paged layer has beside it."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.hip_state.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.hip_state.reorder(
            indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        )


def concatenating(config: Any) -> Cache:
    """The dynamic cache with our decode state: what pages must equal at any budget and refresh."""
    cache = bare(config)
    cache.layers = [
        ConcatenatingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def bare(config: Any) -> DynamicCache:
    """Transformers' dynamic cache, nothing of ours in it: each step selects anew, so pages equal it
    at `decode_refresh=1`."""
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    cache = DynamicCache(config=config)
    assert type(cache) is DynamicCache
    assert {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    return cache


REFERENCES = [
    pytest.param(bare, 1, "stateless", id="bare"),
    pytest.param(concatenating, 4, "kept state", id="with state"),
]


def generate(model: PreTrainedModel, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**batch, do_sample=False, **{"max_new_tokens": 12, **kwargs})


@pytest.fixture
def nothing_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PagedTensor) -> torch.Tensor:
        raise AssertionError("hip gathered the whole cache")

    monkeypatch.setattr(PagedTensor, "dense", refuse)


def kinds(model: PreTrainedModel) -> list[str]:
    """The caches that sparse layers read in the last forward; they all pruned."""
    rows = [row for row in hip_hf.explain(model) if row.path == "sparse"]
    assert all(row.share < 0.9 for row in rows)
    return [row.cache for row in rows]


@pytest.mark.usefixtures("nothing_gathered")
@pytest.mark.parametrize(("reference", "refresh", "kind"), REFERENCES)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_dynamic_cache(
    family: str, beams: int, reference: Any, refresh: int, kind: str
) -> None:
    """At a budget that prunes, in a left-padded batch."""
    model = make_model(family, decode_refresh=refresh)
    batch, sparse = make_batch([130, 95]), 2 - SLIDING.get(family, 0)
    made = generate(model, batch, num_beams=beams, return_dict_in_generate=True)
    assert type(made.past_key_values) is HiPCache
    assert kinds(model) == ["pages"] * sparse
    expected = generate(model, batch, num_beams=beams, past_key_values=reference(model.config))
    assert kinds(model) == [kind] * sparse
    assert torch.equal(made.sequences, expected)


@pytest.mark.usefixtures("nothing_gathered")
@pytest.mark.parametrize(("reference", "refresh", "kind"), REFERENCES)
@pytest.mark.parametrize("how", ["lookup", "assisted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_verified_candidates_equal_the_dynamic_cache(
    family: str, how: str, reference: Any, refresh: int, kind: str
) -> None:
    model = make_model(family, decode_refresh=refresh)
    batch, sparse = make_batch([110]), 2 - SLIDING.get(family, 0)
    options: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 5}
        if how == "lookup"
        else {"assistant_model": make_model(family)}
    )
    # a drafting model takes its own mask from the tokens: one like padding would be a hole in it,
    # and dense
    options["suppress_tokens"] = [model.config.pad_token_id or 0]
    found = generate(model, batch, **options)
    assert kinds(model) == ["pages"] * sparse
    assert torch.equal(
        found, generate(model, batch, past_key_values=reference(model.config), **options)
    )
    assert kinds(model) == [kind] * sparse


@pytest.mark.parametrize("how", ["greedy", "beams", "lookup", "assisted"])
def test_trained_checkpoint(how: str) -> None:
    """It reads text; two prompts of different lengths where `generate` takes several."""
    model, helper = (
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, attn_implementation="hip")
        for _ in range(2)
    )
    hip_hf.configure(
        model, budget=64, window=32, sink=16, dense_layers=1, dense_below=0, decode_refresh=4
    )
    helper.generation_config.num_assistant_tokens = 4
    options: dict[str, Any] = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "lookup": {"prompt_lookup_num_tokens": 5},
        "assisted": {"assistant_model": helper},
    }[how]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    text = (CHECKPOINT.parent / "document.txt").read_text()
    prompts = [text[:900], text[40_000:40_700]][: 2 if how in ("greedy", "beams") else 1]
    batch = dict(tokenizer(prompts, return_tensors="pt", padding=True))
    found = generate(model, batch, past_key_values=HiPCache(model.config), **options)
    assert paths(model) == ["dense", "sparse", "sparse", "sparse"]
    assert kinds(model) == ["pages"] * 3
    assert torch.equal(
        found, generate(model, batch, past_key_values=concatenating(model.config), **options)
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_gets_ordinary_tensors(implementation: str) -> None:
    model = make_model("llama", implementation)
    batch = make_batch([60, 41])
    cache = HiPCache(model.config)
    assert torch.equal(generate(model, batch, past_key_values=cache), generate(model, batch))
    assert cache.get_seq_length() == 71


def test_dense_layers_read_pages_in_place() -> None:
    """Also where a row's pages lie apart, which a batch makes them do."""
    model = make_model("gemma2", dense_layers=2)
    batch = make_batch([70, 52])
    expected = generate(model, batch, past_key_values=concatenating(model.config))
    assert torch.equal(generate(model, batch), expected)
    assert paths(model) == ["dense", "dense"]


@pytest.mark.fast
def test_beams_share_the_prompt_by_reference() -> None:
    model = make_model("llama")
    cache = HiPCache(model.config)
    batch = make_batch([100])
    generate(model, batch, num_beams=4, past_key_values=cache, max_new_tokens=14)
    page, layer = 20, cache.paged[0]
    assert len({table.pages[0] for table in layer.tables}) == 1
    # the prompt's five pages once, and of the thirteen new tokens one page for each beam at most
    assert layer.pool.used <= 100 // page + 4
    assert all(layer.pool.ref_count[p] for table in layer.tables for p in table.pages)


def filled(rows: int = 2, tokens: int = 50) -> tuple[HiPCache, torch.Tensor]:
    """A cache of the tiny Llama with random tokens in its first layer, and its keys."""
    cache = HiPCache(make_model("llama").config)
    keys = torch.randn(rows, 2, tokens, 16)
    for layer in cache.layers:
        layer.update(keys, -keys)
    return cache, keys


def test_appending_copies_no_page_and_allocates_no_arena_per_token() -> None:
    cache, _ = filled(tokens=400)
    layer = cache.paged[0]
    cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    where = [arena.data_ptr() for arena in layer.pool.keys.arenas]
    for _ in range(150):
        cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    assert [arena.data_ptr() for arena in layer.pool.keys.arenas][: len(where)] == where
    assert len(layer.pool.keys.arenas) <= 3


def test_for_the_kernels_pages_stay_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """They grow by being copied, rarely; sequences that share pages keep them, and without memory
    nothing changes."""
    cache = HiPCache(make_model("llama", backend="triton").config)
    layer, plain, where = cache.paged[0], torch.zeros(2, 2, 0, 16), []
    for count in (130, *[1] * 70, 300, *[1] * 10):
        keys = torch.randn(2, 2, count, 16)
        layer.update(keys, -keys)
        if layer.length == 150:
            layer.reorder_cache(torch.tensor([1, 1]))
        plain = torch.cat([plain, keys], 2)
        if layer.length == 150:
            plain = plain[[1, 1]]
        where.append(layer.pool.keys.arenas[0].data_ptr())
        assert len(layer.pool.keys.arenas) == len(layer.pool.values.arenas) == 1
    assert len(set(where)) <= 3
    assert torch.equal(layer.keys, plain)
    assert torch.equal(layer.values, -plain)
    monkeypatch.setattr(layer.pool.values, "make_arena", lambda pages: torch.empty(10**15))
    with pytest.raises(MemoryError, match="HiPCache: no room for"):
        layer.update(torch.randn(2, 2, 5000, 16), torch.randn(2, 2, 5000, 16))
    assert torch.equal(layer.keys, plain)
    assert torch.equal(layer.values, -plain)


def test_a_crop_by_a_tensor_leaves_each_layer_a_length_of_its_own() -> None:
    """As Transformers 5.17 crops in assisted decoding; a length that were a tensor would be the
    next call's as well."""
    cache = HiPCache(make_model("llama").config)
    for layer in range(len(cache.layers)):
        cache.update(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), layer)
    cache.crop(torch.tensor(-4))
    assert [layer.get_seq_length() for layer in cache.layers] == [5] * len(cache.layers)
    assert all(type(layer.get_seq_length()) is int for layer in cache.layers)


def test_arguments_of_transformers_own_cache() -> None:
    """Whoever makes a cache with all of them gets ours where they are at their defaults, and
    Transformers' own otherwise."""
    config = make_model("llama").config
    for others in (
        dict(offloading=False),
        dict(ddp_cache_data=None, offloading=False, offload_only_non_sliding=False),
    ):
        for made in (DynamicCache(config=config, **others), HiPCache(config=config, **others)):
            assert type(made) is HiPCache
            assert [type(layer) for layer in made.layers] == [paged_layer.PagedLayer] * 2
    keys = torch.randn(1, 2, 5, 16)
    own = DynamicCache([(keys, keys), (keys, keys)], config=config)
    assert (
        type(own)
        is type(DynamicCache(ddp_cache_data=[(keys, keys)] * 2, config=config))
        is DynamicCache
    )
    assert (
        type(DynamicCache.__new__(DynamicCache, config=config, offloading=True)) is DynamicCache
    )  # made, it asks for a GPU
    with pytest.raises(
        ValueError, match="offloading: got True, allowed: the defaults of `DynamicCache`"
    ):
        HiPCache(config, offloading=True)
    with pytest.raises(ValueError, match="offlaod: got 'cpu', allowed"):
        HiPCache(config, offlaod="cpu", device_pages=None)


@pytest.mark.fast
def test_crop_removes_as_many_tokens_as_transformers_does() -> None:
    cache, keys = filled()
    plain = DynamicLayer()
    plain.update(keys, -keys)
    for count in (-7, 0):
        for layer in (cache.layers[0], plain):
            layer.crop(count)
        assert cache.get_seq_length() == 43
        assert torch.equal(cache.layers[0].keys, plain.keys)
    with pytest.raises(
        ValueError,
        match="tokens_to_remove: got 20, allowed: minus the number of tokens to remove, or 0",
    ):
        cache.layers[0].crop(20)
    assert cache.get_seq_length() == 43


@pytest.mark.fast
def test_batch_operations_and_reset() -> None:
    cache, keys = filled(rows=3)
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[1].values, -keys.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(cache.layers[0].keys, keys[[2, 0]])
    assert cache.paged[0].pool.used == 2 * 3
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].keys, keys[[0, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.update(keys, keys, 0)
    assert torch.equal(cache.layers[0].keys, keys)


@pytest.mark.fast
def test_a_deep_copy_is_independent() -> None:
    cache, keys = filled()
    other = copy.deepcopy(cache)
    assert other.config is cache.config
    other.update(torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16), 0)
    assert cache.layers[0].get_seq_length() == 50
    assert torch.equal(cache.layers[0].keys, keys)
    assert torch.equal(other.layers[0].keys[:, :, :50], keys)


@pytest.mark.parametrize("failing", [0, 1])
def test_running_out_of_memory(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer nothing has changed; in the second, the first has the call's tokens
    already."""
    model = make_model("llama")
    ids = make_batch([60])["input_ids"]
    cache, fresh = HiPCache(model.config), HiPCache(model.config)
    with torch.no_grad():
        for one in (cache, fresh):
            model(ids[:, :40], past_key_values=one)

        def full(pages: int) -> torch.Tensor:
            raise RuntimeError("can't allocate memory")

        monkeypatch.setattr(cache.paged[failing].pool.values, "make_arena", full)
        with pytest.raises(MemoryError, match="HiPCache: no room for"):
            model(ids[:, 40:], past_key_values=cache)
        monkeypatch.undo()
        assert cache.layers[failing].get_seq_length() == 40
        if failing:
            with pytest.raises(
                ValueError,
                match=r"a part of a call which failed \(MemoryError\), allowed: `reset\(\)`",
            ):
                model(ids[:, 40:], past_key_values=cache)
            cache.reset()
            model(ids[:, :40], past_key_values=cache)
        again = model(ids[:, 40:], past_key_values=cache).logits
        assert torch.equal(again, model(ids[:, 40:], past_key_values=fresh).logits)


@pytest.mark.fast
def test_bad_input() -> None:
    with pytest.raises(ValueError, match="config: got HiPConfig, allowed: the model's config"):
        HiPCache(hip_hf.HiPConfig())  # type: ignore[arg-type]
    cache, _ = filled()
    with pytest.raises(ValueError, match="key_states: got"):
        cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("implementation", ["hip", "eager"])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("budget", [32, 512])
def test_decode_where_gradients_are_on(
    budget: int, patched: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as under `no_grad`, one warning, and no gradient that lacks what went
    through the cache."""
    monkeypatch.setattr("hip_hf.integration.cache_layers._warned", False)
    model, ids = make_model("llama", budget=budget), make_batch([200])["input_ids"]
    if patched:
        hip_hf.patch(model)
    model.set_attn_implementation(implementation)
    found: list[list[torch.Tensor]] = [[], []]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for on, logits in zip((True, False), found, strict=True):
            cache = HiPCache(model.config)
            with torch.set_grad_enabled(on):
                for at, rows in ((0, 180), *((at, 1) for at in range(180, 200))):
                    logits.append(model(ids[:, at : at + rows], past_key_values=cache).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert len([one for one in said if "without their gradients" in str(one.message)]) == 1
    found[0][0].sum().backward()  # the first call brought all its tokens
    with pytest.raises(
        ValueError,
        match=r"^HiPCache: got a backward pass through attention to cached tokens.*, allowed: ",
    ):
        found[0][-1].sum().backward()


@pytest.mark.parametrize("patched", [False, True])
def test_frozen_layers_do_not_hide_that_gradients_are_lost(patched: bool) -> None:
    """A prefix that is trained, before a model that is not (PEFT's prefix tuning): no layer's
    queries ask for gradients."""
    model, ids = make_model("llama").requires_grad_(False), make_batch([20])["input_ids"]
    if patched:
        hip_hf.patch(model)
    cache = HiPCache(model.config)
    for layer in range(2):
        cache.update(torch.randn(1, 2, 9, 16, requires_grad=True), torch.randn(1, 2, 9, 16), layer)
    with pytest.raises(
        ValueError, match=r"^HiPCache: got a backward pass through attention to cached tokens"
    ):
        model(ids, past_key_values=cache).logits.sum().backward()
    cache.reset()
    assert not model(ids, past_key_values=cache).logits.requires_grad


def test_a_training_step_with_a_cache_has_the_gradients_of_one_without() -> None:
    ids, gradients = make_batch([60])["input_ids"], []
    for cached in (True, False):
        model = make_model("llama")
        model(ids, use_cache=cached).logits.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_sliding_layers_keep_their_window() -> None:
    cache = HiPCache(make_model("gemma2").config)
    assert [type(layer) for layer in cache.layers] == [
        DynamicSlidingWindowLayer,
        paged_layer.PagedLayer,
    ]


def test_a_handle_is_the_ordinary_tensor_to_everyone_else() -> None:
    cache, keys = filled()
    handle, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    assert isinstance(handle, PagedTensor)
    whole = torch.cat([keys, keys[:, :, :1]], dim=2)
    assert torch.equal(handle * 2, whole * 2)
    assert torch.equal(
        handle[:, :, 3:7].repeat_interleave(2, 1), whole[:, :, 3:7].repeat_interleave(2, 1)
    )
