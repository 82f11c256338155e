"""Layers that reuse the keys of earlier ones (Gemma 3n, Gemma 4): they may get the last query rows
alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from families import _BASE, SPARSE, make_batch, paths
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hip_hf
from hip_hf import HiPCache
from hip_hf.integration import layer_attention

_SHARED: dict[str, Any] = dict(
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
    sliding_window=24,
)
_EMBEDDINGS: dict[str, Any] = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=100)
MODELS: dict[str, dict[str, Any]] = {
    "gemma3n_text": dict(
        _EMBEDDINGS, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4
    ),
    "gemma4_text": dict(_EMBEDDINGS, global_head_dim=16),
    "gemma4_unified_text": dict(global_head_dim=16),
}
COVERED = {**SPARSE, "budget": 512}


@functools.cache
def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**_BASE, **_SHARED, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)  # sharper attention than a fresh initialisation has
    model.generation_config.eos_token_id = None
    return model


def make(name: str, implementation: str = "hip", **settings: Any) -> PreTrainedModel:
    model = made(name)
    model.set_attn_implementation(implementation)
    hip_hf.configure(model, hip_hf.HiPConfig(**{**COVERED, **settings}))
    return model


def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 7, 40])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_last_rows(name: str, keep: int, cached: bool) -> None:
    batch = make_batch([150, 111])
    got = logits(make(name), batch, logits_to_keep=keep, use_cache=cached)
    assert paths(made(name)) == ["dense", "sparse"] * 2
    want = logits(make(name, "eager"), batch, logits_to_keep=keep, use_cache=cached)
    real = batch["attention_mask"].bool()[:, -got.shape[1] :]
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 50}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("name", MODELS)
def test_generates_as_eager_does(name: str, options: dict[str, Any]) -> None:
    batch, found = make_batch([150, 111]), []
    for implementation in ("hip", "eager"):
        model = make(name, implementation)
        out = model.generate(
            **batch,
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            **options,
        )
        found.append(torch.stack(out.logits))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [0, 30])
def test_packed_sequences(keep: int) -> None:
    """Three sequences in a row; the second is longer than what is kept."""
    lengths = [50, 70, 20]
    ids = make_batch([sum(lengths)])["input_ids"]
    batch = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    got, want = (
        logits(make("gemma4_text", one), batch, logits_to_keep=keep, use_cache=False)
        for one in ("hip", "eager")
    )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_each_layer_keeps_its_own_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that reuses keys decodes as one that has a cache of its own: it neither undoes the
    other's state nor lacks one."""
    model, ids = make("gemma4_text", budget=32, decode_refresh=8), make_batch([200])["input_ids"]
    cache, made_for = HiPCache(model.config), []
    logits(model, {"input_ids": ids[:, :180]}, past_key_values=cache)
    rows: dict[int, Any] = {}

    def watched(problem: Any, config: Any, layer: int, state: Any, *args: Any) -> Any:
        result = attend(problem, config, layer, state, *args)
        if result.path == "sparse":
            made_for.append(state.rows[0].selection is rows.get(layer))
            rows[layer] = state.rows[0].selection
        return result

    attend = layer_attention.attend
    monkeypatch.setattr(layer_attention, "attend", watched)
    for at in range(180, 192):
        logits(model, {"input_ids": ids[:, at : at + 1]}, past_key_values=cache)
    assert made_for.count(False) == 4, "two layers, two selections each in 12 steps"
    layer = next(layer for layer in cache.layers if hasattr(layer, "hip_state"))
    states = [layer.hip_state.of_layer(1), layer.hip_state.of_layer(3)]
    assert states[0] is not states[1]
    assert [state.rows[0].position for state in states] == [192] * 2
    layer.crop(-10)
    assert [state.rows[0].position for state in states] == [182] * 2


def test_a_failure_in_a_layer_that_reuses_keys_reaches_their_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has one query row, where the layers before it have cached 40 tokens."""
    model, ids = make("gemma4_text"), make_batch([100])["input_ids"]
    cache = HiPCache(model.config)

    def exhausted(problem: Any, config: Any, layer: int, *args: Any) -> Any:
        if layer == 3:
            raise torch.OutOfMemoryError("no memory")
        return attend(problem, config, layer, *args)

    attend = layer_attention.attend
    monkeypatch.setattr(layer_attention, "attend", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        logits(model, {"input_ids": ids[:, :40]}, past_key_values=cache, logits_to_keep=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="got a cache that holds a part of a call which failed"):
        logits(model, {"input_ids": ids[:, :40]}, past_key_values=cache)
    cache.reset()
    got = logits(model, {"input_ids": ids}, past_key_values=cache, logits_to_keep=1)
    torch.testing.assert_close(
        got,
        logits(make("gemma4_text", "eager"), {"input_ids": ids}, logits_to_keep=1),
        atol=1e-4,
        rtol=1e-4,
    )
