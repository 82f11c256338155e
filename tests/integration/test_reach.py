"""Models that would accept `hip` and ignore it, or whose settings would not reach their layers, and
layers with odd indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SPARSE, make_batch
from sweep import build
from tiny_configs import tiny_config
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    PreTrainedModel,
)

import hip_hf
from hip_hf.integration import layer_attention
from hip_hf.integration.paged_layer import PagedHybridLayer

IGNORE = ["openai-gpt", "cpmant", "xlnet", "reformer", "mamba", "rwkv"]


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("name", IGNORE)
def test_a_model_that_would_ignore_it_is_refused_as_it_is_made(name: str, auto: Any) -> None:
    """With attention of its own, which even asks for no mask, or with none at all."""
    said = f"attn_implementation: got 'hip' for model type '{name}', whose language part does not"
    with pytest.raises(ValueError, match=said):
        auto.from_config(tiny_config(name), attn_implementation="hip")


@pytest.mark.parametrize("name", ["openai-gpt", "mamba", "git"])
@pytest.mark.parametrize("asked", ["hip", "streaming", {"": "hip"}])
def test_and_as_its_attention_is_set(name: str, asked: Any) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="eager")
    with pytest.raises(ValueError, match=f"for model type '{name}'"):
        model.set_attn_implementation(asked)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_ignores_it_has_no_empty_table() -> None:
    """Where the config was changed by hand, behind the model's back."""
    model = AutoModelForCausalLM.from_config(tiny_config("openai-gpt"), attn_implementation="eager")
    model.config._attn_implementation = "hip"
    with pytest.raises(ValueError, match="would ignore it"):
        hip_hf.explain(model)


def test_settings_that_would_not_reach_the_layers() -> None:
    """BLT's layers read configs of their own."""
    with pytest.raises(ValueError, match="no settings would reach them"):
        AutoModelForCausalLM.from_config(tiny_config("blt"), attn_implementation="hip")


class OwnAttention(nn.Module):
    """An attention layer that asks nobody."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.layer_idx = config, 0


class OwnModel(PreTrainedModel, GenerationMixin):
    """A user's model."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.attention = OwnAttention(config)
        self.post_init()


def test_a_users_own_model_is_looked_at_as_well() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=2)
    OwnModel._from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="would ignore it"):
        OwnModel._from_config(config, attn_implementation="hip")


@pytest.mark.parametrize("dense_layers", [0, 1, 3])
@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_a_layer_without_an_index_has_no_rules_for_single_layers(
    name: str, dense_layers: int
) -> None:
    """Zamba's shared attention has none, Zamba 2's has -1, which is less than any count."""
    model = build("causal", name, "hip")
    hip_hf.configure(model, **{**SPARSE, "dense_layers": dense_layers})
    with torch.no_grad():
        model(**make_batch([200]))
    rows = hip_hf.explain(model)
    assert rows
    assert {(row.layer, row.path, row.reason) for row in rows} == {(None, "sparse", "")}


STATEFUL = ["deepseek_v3", "jetmoe", "falcon_h1", "zamba2"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_of_hybrid_layers_and_of_rebuilt_keys(
    name: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruned decode on kept state gives what rebuilding it at every step gives."""
    model = build("causal", name, "hip")
    hip_hf.configure(model, **{**SPARSE, "decode_refresh": 1})

    def run() -> tuple[torch.Tensor, set[tuple[str, str]]]:
        options = dict(
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        out = model.generate(**make_batch([180, 131]), **options, cache_implementation=cache)
        return torch.stack(out.logits), {(row.path, row.cache) for row in hip_hf.explain(model)}

    kept, rows = run()
    paged = cache == "dynamic" and name not in ("deepseek_v3", "jetmoe")
    assert rows == {("sparse", "pages" if paged else "kept state")}
    monkeypatch.setattr(layer_attention, "state_of", lambda keys, model_type: None)
    torch.testing.assert_close(kept, run()[0], atol=1e-4, rtol=1e-4)


def test_rebuilt_keys_take_no_state_of_another_models_cache() -> None:
    """A model that attends by `sdpa` fills a cache, whose state nobody asks for; the next model has
    no cache of its own."""
    other, model = build("causal", "llama", "sdpa"), build("causal", "deepseek_v3", "hip")
    hip_hf.configure(model, **SPARSE)
    cache = hip_hf.HiPCache(other.config)
    with torch.no_grad():
        other(**make_batch([200]), past_key_values=cache)
        model(**make_batch([200]), use_cache=False)
    assert {row.path for row in hip_hf.explain(model)} == {"sparse"}
    assert {row.cache for row in hip_hf.explain(model)} == {"none"}
    assert not any(layer.hip_state.rows for layer in cache.layers)


def test_hybrid_pages_follow_beams_and_resets() -> None:
    results = []
    for implementation in ("eager", "hip"):
        model = build("causal", "falcon_h1", implementation)
        hip_hf.configure(model, **{**SPARSE, "budget": 512})
        cache = hip_hf.HiPCache(model.config)
        assert {type(layer) for layer in cache.layers} == {PagedHybridLayer}
        for _ in range(2):
            out = model.generate(
                **make_batch([90, 60]),
                max_new_tokens=8,
                num_beams=3,
                do_sample=False,
                pad_token_id=0,
                past_key_values=cache,
            )
            results.append(out)
            cache.reset()
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_hybrid_layers_are_not_saved_without_their_running_state(tmp_path: Any) -> None:
    model = build("causal", "falcon_h1", "hip")
    cache = hip_hf.HiPCache(model.config)
    with torch.no_grad():
        model(**make_batch([40]), past_key_values=cache)
    with pytest.raises(ValueError, match="cache: got a PagedHybridLayer"):
        cache.save(tmp_path / "cache.safetensors")
