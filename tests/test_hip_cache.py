"""`HiPCache`: the tokens of a dynamic cache, whatever `generate` does to it, and no copy of the context on the way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hip_hf
from hip_hf import HiPCache
from hip_hf.cache import hip_cache
from hip_hf.integration.cache import Stateful
from hip_hf.paged import PagedTensor

FAMILIES = ("llama", "mistral", "mistral_full", "qwen3", "gemma2")
SLIDING = {"mistral": 2, "gemma2": 1}  # of two layers; these are dense, and keep their window themselves
CHECKPOINT = Path(hip_hf.__file__).parent / "assets" / "checkpoint"


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages for short contexts, of a size that key blocks straddle."""
    monkeypatch.setattr(hip_cache, "PAGE", 20)


class ConcatenatingLayer(Stateful, DynamicLayer):
    """Transformers' own dynamic layer, with the state that a paged layer has beside it."""


def concatenating(config: Any) -> Cache:
    """The dynamic cache: what pages must equal, token by token, at any budget and refresh."""
    return Cache(layers=[copy.copy(layer) for layer in plain_layers(config)])


def plain_layers(config: Any) -> Iterator[Any]:
    for layer in HiPCache(config).layers:
        yield ConcatenatingLayer() if isinstance(layer, hip_cache.PagedLayer) else layer


def generate(model: PreTrainedModel, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**batch, do_sample=False, **{"max_new_tokens": 12, **kwargs})


@pytest.fixture
def nothing_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PagedTensor) -> torch.Tensor:
        raise AssertionError("hip gathered the whole cache")

    monkeypatch.setattr(PagedTensor, "dense", refuse)


@pytest.mark.usefixtures("nothing_gathered")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_dynamic_cache(family: str, beams: int) -> None:
    """At a budget that prunes, in a left-padded batch, selections reused."""
    model = make_model(family, decode_refresh=4)
    batch = make_batch([130, 95])
    made = generate(model, batch, num_beams=beams, return_dict_in_generate=True)
    assert type(made.past_key_values) is HiPCache
    kinds = [layer.cache for layer in hip_hf.explain(model)]
    assert kinds.count("pages") == paths(model).count("sparse") == 2 - SLIDING.get(family, 0)
    assert all(row.share < 0.9 for row in hip_hf.explain(model) if row.path == "sparse")
    assert torch.equal(made.sequences, generate(model, batch, num_beams=beams, past_key_values=concatenating(model.config)))


@pytest.mark.usefixtures("nothing_gathered")
@pytest.mark.parametrize("how", ["lookup", "assisted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_verified_candidates_equal_the_dynamic_cache(family: str, how: str) -> None:
    model = make_model(family, decode_refresh=4)
    batch = make_batch([110])
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5} if how == "lookup" else {"assistant_model": make_model(family)}
    expected = generate(model, batch, past_key_values=concatenating(model.config), **options)
    assert torch.equal(generate(model, batch, **options), expected)
    assert paths(model).count("sparse") == 2 - SLIDING.get(family, 0)


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(prompt_lookup_num_tokens=5)], ids=lambda how: str([*how]))
def test_trained_checkpoint(how: dict[str, Any]) -> None:
    """It reads text; two prompts of different lengths where `generate` takes several."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, attn_implementation="hip")
    hip_hf.configure(model, budget=64, window=32, sink=16, dense_layers=1, dense_below=0, decode_refresh=4)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    text = (CHECKPOINT.parent / "document.txt").read_text()
    prompts = [text[:1500], text[40_000:41_000]][: 2 if not how or "num_beams" in how else 1]
    batch = dict(tokenizer(prompts, return_tensors="pt", padding=True))
    expected = generate(model, batch, past_key_values=concatenating(model.config), **how)
    assert torch.equal(generate(model, batch, **how), expected)
    assert paths(model) == ["dense", "sparse", "sparse", "sparse"]


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


def test_beams_share_the_prompt_by_reference() -> None:
    model = make_model("llama")
    cache = HiPCache(model.config)
    batch = make_batch([100])
    generate(model, batch, num_beams=4, past_key_values=cache, max_new_tokens=14)
    page, layer = 20, cache.paged[0]
    assert len({table.pages[0] for table in layer.tables}) == 1
    # the prompt's five pages once, and of the thirteen new tokens one page for each beam at most
    assert layer.pool.used <= 100 // page + 4
    assert all(layer.pool.shares[p] for table in layer.tables for p in table.pages)


def filled(rows: int = 2, tokens: int = 50) -> tuple[HiPCache, torch.Tensor]:
    """A cache of the tiny Llama with random tokens in its first layer, and its keys."""
    cache = HiPCache(make_model("llama").config)
    keys = torch.randn(rows, 2, tokens, 16)
    for layer in cache.layers:
        layer.update(keys, -keys)
    return cache, keys


def test_appending_copies_no_page_and_allocates_no_slab_per_token() -> None:
    cache, _ = filled(tokens=400)
    layer = cache.paged[0]
    cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    where = [slab.data_ptr() for slab in layer.pool.keys.slabs]
    for _ in range(150):
        cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    assert [slab.data_ptr() for slab in layer.pool.keys.slabs][: len(where)] == where
    assert len(layer.pool.keys.slabs) <= 3


def test_crop_means_what_it_means_in_this_version() -> None:
    cache, keys = filled()
    plain = DynamicLayer()
    plain.update(keys, -keys)
    for count in (-7, 0, 20):
        outcomes = []
        for layer in (cache.layers[0], plain):
            try:
                layer.crop(count)
                outcomes.append("")
            except ValueError as error:
                outcomes.append(type(error).__name__)
        assert outcomes[0] == outcomes[1], count
        assert cache.get_seq_length() == plain.get_seq_length()
        if plain.get_seq_length():
            assert torch.equal(cache.layers[0].keys, plain.keys)


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


def test_a_deep_copy_is_independent() -> None:
    cache, keys = filled()
    other = copy.deepcopy(cache)
    assert other.config is cache.config
    other.update(torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16), 0)
    assert cache.layers[0].get_seq_length() == 50
    assert torch.equal(cache.layers[0].keys, keys)
    assert torch.equal(other.layers[0].keys[:, :, :50], keys)


def test_running_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    ids = make_batch([60])["input_ids"]
    cache = HiPCache(model.config)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]

        def full(pages: int) -> torch.Tensor:
            raise RuntimeError("can't allocate memory")

        monkeypatch.setattr(cache.paged[1].pool.values, "make_slab", full)
        with pytest.raises(MemoryError, match="HiPCache: no room for"):
            model(ids[:, 40:], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
        monkeypatch.undo()
        again = model(ids[:, 40:], past_key_values=cache).logits
        fresh = HiPCache(model.config)
        model(ids[:, :40], past_key_values=fresh)
        assert torch.equal(again, model(ids[:, 40:], past_key_values=fresh).logits)


def test_bad_input() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="config: got HiPConfig, allowed: the model's config"):
        HiPCache(hip_hf.HiPConfig())  # type: ignore[arg-type]
    cache, _ = filled()
    with pytest.raises(ValueError, match="key_states: got"):
        cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    assert cache.get_seq_length() == 50
    ids = make_batch([60])["input_ids"]
    cache = HiPCache(model.config)
    model(ids[:, :40], past_key_values=cache).logits.sum().backward()
    assert cache.get_seq_length() == 40
    with pytest.raises(ValueError, match="require gradients after 40 cached tokens"):
        model(ids[:, 40:], past_key_values=cache)
    assert cache.layers[0].get_seq_length() == 40


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
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, hip_cache.PagedLayer]


def test_a_handle_is_the_ordinary_tensor_to_everyone_else() -> None:
    cache, keys = filled()
    handle, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    assert isinstance(handle, PagedTensor)
    whole = torch.cat([keys, keys[:, :, :1]], dim=2)
    assert torch.equal(handle * 2, whole * 2)
    assert torch.equal(handle[:, :, 3:7].repeat_interleave(2, 1), whole[:, :, 3:7].repeat_interleave(2, 1))
