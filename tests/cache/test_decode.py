"""Decode inside Transformers: the state follows the cache through everything that `generate` does
to it."""

import copy

import pytest
import torch
from families import make_batch, make_model, paths
from transformers import DynamicCache, StaticCache

import hip_hf
from hip_hf.integration.cache_layers import HiPStaticLayer


def run(model, batch, **kwargs):
    with torch.no_grad():
        return model.generate(**batch, do_sample=False, **{"max_new_tokens": 40, **kwargs})


def without_state(monkeypatch):
    """Every call rebuilds pyramid and selection from the keys: the reference for what the kept
    state must give."""
    from hip_hf.integration import layer_attention

    monkeypatch.setattr(layer_attention, "state_of", lambda keys, model_type: None)


@pytest.mark.fast
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_kept_state_equals_stateless_decode(family, cache, monkeypatch):
    model = make_model(family, decode_refresh=1)
    batch = make_batch([180, 131])
    kept = run(model, batch, cache_implementation=cache)
    assert hip_hf.explain(model)[1].cache == {"dynamic": "pages", "static": "kept state"}[cache]
    assert hip_hf.explain(model)[1].share < 0.6
    without_state(monkeypatch)
    assert torch.equal(run(model, batch, cache_implementation=cache), kept)


def test_generation_is_sparse_and_differs_from_dense():
    """The settings of these tests do prune: otherwise nothing above would mean anything."""
    model = make_model("llama", decode_refresh=1)
    batch = make_batch([180, 131])
    with torch.no_grad():
        sparse = model(**batch).logits
        model.set_attn_implementation("eager")
        dense = model(**batch).logits
    assert (sparse - dense)[:, -1].abs().max() > 1e-2


@pytest.mark.parametrize("beams", [3])
def test_beam_search_follows_reorder(beams, monkeypatch):
    model = make_model("llama", decode_refresh=1)
    batch = make_batch([150, 120])
    kept = run(model, batch, num_beams=beams)
    assert paths(model) == ["sparse", "sparse"]
    without_state(monkeypatch)
    assert torch.equal(run(model, batch, num_beams=beams), kept)


def test_beam_search_with_covering_budget_equals_eager():
    model = make_model("llama", budget=1024)
    batch = make_batch([90, 61])
    actual = run(model, batch, num_beams=3)
    model.set_attn_implementation("eager")
    assert torch.equal(actual, run(model, batch, num_beams=3))


def test_prompt_lookup_gives_the_tokens_of_plain_decoding(monkeypatch):
    """Several rows are verified at once, each selecting for itself; rejected ones are cropped away
    again."""
    from hip_hf.backends.torch import sparse

    model = make_model("llama", decode_refresh=1)
    batch = make_batch([200])
    # The last token is new, so that nothing is looked up before the first step: candidates
    # prefilled with the prompt would share the selection of its last query block. From then on, the
    # model repeats itself.
    batch["input_ids"][batch["input_ids"] == 98] = 97
    batch["input_ids"][0, -1] = 98
    plain = run(model, batch)
    verified = []
    original = sparse.SparseAttention._decode
    monkeypatch.setattr(
        sparse.SparseAttention,
        "_decode",
        lambda self, t, span, row: verified.append(span.rows) or original(self, t, span, row),
    )
    assert torch.equal(run(model, batch, prompt_lookup_num_tokens=6), plain)
    assert max(verified) > 1
    assert paths(model) == ["sparse", "sparse"]


def perturbed_assistant():
    assistant = make_model("llama", decode_refresh=1)
    for parameter in assistant.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return assistant


def test_assisted_decoding_with_covering_budget_equals_eager():
    model = make_model("llama", budget=1024)
    batch = make_batch([170])
    actual = run(model, batch, assistant_model=perturbed_assistant())
    assert paths(model) == ["sparse", "sparse"]
    model.set_attn_implementation("eager")
    assert torch.equal(actual, run(model, batch))


def test_assisted_decoding_follows_crop(monkeypatch):
    model = make_model("llama", decode_refresh=1)
    batch = make_batch([170])
    kept = run(
        model,
        batch,
        assistant_model=perturbed_assistant(),
        past_key_values=hip_hf.HiPCache(model.config),
    )
    assert hip_hf.explain(model)[1].cache == "pages"
    without_state(monkeypatch)
    assert torch.equal(run(model, batch, assistant_model=perturbed_assistant()), kept)


def test_refresh_reuses_a_selection_for_exactly_that_many_steps(monkeypatch):
    from hip_hf.methods.hip import TreeSearch

    model = make_model("llama", decode_refresh=4)
    searched = []
    original = TreeSearch.select
    monkeypatch.setattr(
        TreeSearch, "select", lambda self, *args: searched.append(1) or original(self, *args)
    )
    cache = DynamicCache(config=model.config)
    ids = make_batch([200])["input_ids"]
    counts = []
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(9):
            searched.clear()
            model(ids[:, :1], past_key_values=cache)
            counts.append(len(searched))
    layers = 2
    assert counts == [layers, 0, 0, 0, layers, 0, 0, 0, layers]


def test_the_pyramid_is_extended_and_never_rebuilt(monkeypatch):
    from hip_hf.methods.pyramid import Pyramid

    model = make_model("llama", decode_refresh=1)
    appended = []
    original = Pyramid._append

    def counting(self, keys, blocks):
        appended.append(blocks - self.blocks)
        original(self, keys, blocks)

    cache = DynamicCache(config=model.config)
    ids = make_batch([200])["input_ids"]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        monkeypatch.setattr(Pyramid, "_append", counting)
        for _ in range(40):
            model(ids[:, :1], past_key_values=cache)
    # 40 keys are five blocks of 8, in each of two layers, one at a time
    assert appended == [1] * 10


@pytest.mark.parametrize("removed", [1, 30, 120])
def test_crop_then_continue_equals_a_fresh_cache(removed):
    model = make_model("llama", decode_refresh=4)
    ids = make_batch([220])["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :200], past_key_values=cache)
        for at in range(200, 210):
            model(ids[:, at : at + 1], past_key_values=cache)
        length = 210 - removed
        cache.crop(-removed)
        assert cache.get_seq_length() == length
        fresh = DynamicCache(config=model.config)
        for layer, other in zip(fresh.layers, cache.layers, strict=True):
            layer.update(other.keys.clone(), other.values.clone())
        for at in range(210, 215):
            actual = model(ids[:, at : at + 1], past_key_values=cache).logits
            expected = model(ids[:, at : at + 1], past_key_values=fresh).logits
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert paths(model) == ["sparse", "sparse"]


def test_batch_operations_follow():
    model = make_model("llama", decode_refresh=4)
    batch = make_batch([180, 140, 97])
    cache = DynamicCache(config=model.config)
    step = torch.tensor([[5], [6], [7]])
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        mask = batch["attention_mask"]
        for _ in range(3):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], -1)
            model(step, attention_mask=mask, past_key_values=cache)
        chosen = torch.tensor([2, 0, 0])
        cache.batch_select_indices(chosen)
        mask = torch.cat([mask[chosen], torch.ones(3, 1, dtype=torch.long)], -1)
        actual = model(step, attention_mask=mask, past_key_values=cache).logits
        fresh = DynamicCache(config=model.config)
        for layer, other in zip(fresh.layers, cache.layers, strict=True):
            layer.update(other.keys[:, :, :-1].clone(), other.values[:, :, :-1].clone())
            # the kept selection was made for the step before last: make the fresh cache reuse the
            # same
            layer.hip_state = copy.deepcopy(other.hip_state)
            layer.hip_state.crop(mask.shape[1] - 1)
        other = copy.deepcopy(cache)
        other.crop(-1)
        expected = model(step, attention_mask=mask, past_key_values=fresh).logits
        again = model(step, attention_mask=mask, past_key_values=other).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    assert actual.isfinite().all()


def test_reset_starts_afresh():
    model = make_model("llama")
    ids = make_batch([200])["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=260)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        model(ids[:, :1], past_key_values=cache)
        cache.reset()
        assert all(not layer.hip_state.rows for layer in cache.layers)
        again = model(ids, past_key_values=cache).logits
    assert torch.equal(first, again)


def test_static_layers_are_inert_for_other_attention():
    model = make_model("llama", "eager")
    batch = make_batch([80, 50])
    with_ours = run(model, batch, cache_implementation="static")
    assert isinstance(StaticCache(config=model.config, max_cache_len=8).layers[0], HiPStaticLayer)
    plain = DynamicCache()  # without a config: Transformers' own layers
    with torch.no_grad():
        assert torch.equal(
            model.generate(**batch, do_sample=False, max_new_tokens=40, past_key_values=plain),
            with_ours,
        )


def test_without_our_cache_layers_decode_is_stateless_and_right():
    model = make_model("llama", decode_refresh=1)
    batch = make_batch([150, 99])
    expected = run(model, batch)
    plain = DynamicCache()
    assert torch.equal(run(model, batch, past_key_values=plain), expected)
    assert hip_hf.explain(model)[0].cache == "stateless"
    assert paths(model) == ["sparse", "sparse"]
