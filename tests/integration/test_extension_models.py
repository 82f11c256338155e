"""Context extension in models: beyond the trained length, every way of feeding a model gives the
same, and dense within it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from continuous import alone, batched, prompts
from extended_models import SMALL, TRAINED, same, turning_back
from families import _BASE, FAMILIES, PATCHED, SPARSE, make_batch, make_model
from patched import attention, logits
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GemmaConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

import hip_hf
from hip_hf.integration import extension

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
ROTATED_BACK: dict[str, PreTrainedConfig] = {
    "gemma": GemmaConfig(**_BASE),
    "granite": GraniteConfig(**_BASE),
    "phi3": Phi3Config(**_BASE, partial_rotary_factor=0.5),
    "starcoder2": Starcoder2Config(**_BASE),
    "stablelm": StableLmConfig(**_BASE, partial_rotary_factor=0.5),
    "olmo": OlmoConfig(**_BASE),
    "olmo2": Olmo2Config(**_BASE),
}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The families of these tests are known to `make_model`, and trained for little."""
    for name, config in {**FAMILIES, **PATCHED, **ROTATED_BACK}.items():
        small = copy.deepcopy(config)
        small.max_position_embeddings = TRAINED
        if name not in ("gemma2", "qwen2_moe"):  # Qwen2-MoE's is used by no layer
            small.sliding_window = None
        monkeypatch.setitem(FAMILIES if name not in PATCHED else PATCHED, name, small)


def extended(family: str, **fields: Any) -> PreTrainedModel:
    model = make_model(family, **fields)
    hip_hf.configure(model, extend="streaming")
    return model


def positions_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def rows(x: torch.Tensor, lengths: list[int]) -> Iterator[torch.Tensor]:
    return (x[row, -length:] for row, length in enumerate(lengths))


@pytest.mark.parametrize(
    "family", ["llama", "mistral_full", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", *ROTATED_BACK]
)
def test_dense_within_the_trained_length(family: str) -> None:
    """`sink + budget + window` is all of it."""
    lengths = [TRAINED, 90, 3]
    batch = make_batch(lengths)
    expected = logits(make_model(family, "eager"), batch, position_ids=positions_of(batch))
    model = extended(family, budget=104)
    assert bool(attention(model)) == (family in PATCHED)
    actual = logits(model, batch, position_ids=positions_of(batch))
    for a, b in zip(rows(actual, lengths), rows(expected, lengths), strict=True):
        same(a, b)
    assert {row.path for row in hip_hf.explain(model)} == {"sparse"}
    hip_hf.configure(model, method="dense")
    same(logits(model, batch, position_ids=positions_of(batch))[0], expected[0])


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("patched", [True, False])
def test_every_kind_of_rope(kind: str, patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(PATCHED["llama"])
    config.rope_parameters = ROPES[kind]
    monkeypatch.setitem(PATCHED, "llama", config)
    batch = make_batch([TRAINED])
    expected = logits(make_model("llama", "eager"), batch)
    model = extended("llama", budget=104)
    if not patched:
        turning_back(model)
    same(logits(model, batch), expected)
    own, rope = model.model.rotary_emb, extension.rope_of(model.config)
    assert torch.equal(own.inv_freq, rope.inv_freq)
    assert own.attention_scaling == rope.scaling


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", ["hip", "dense"])
def test_keys_rotated_back_are_the_keys_before_rotation(family: str, method: str) -> None:
    """Far beyond the trained length, where nothing but the positions of the rules is in reach."""
    batch = make_batch([500])
    model = extended(family, method=method)
    assert attention(model)
    expected = logits(model, batch)
    turning_back(model)
    same(logits(model, batch), expected, 1e-3)


def test_a_fixed_rotation_of_everything_changes_nothing() -> None:
    model = extended("llama")
    batch = make_batch([300])
    expected = logits(model, batch)
    moved = torch.arange(300)[None] + 10_000
    assert torch.equal(logits(model, batch, position_ids=moved), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("fields", [{}, {"method": "dense"}, {"dense_tail": 20, "dense_layers": 1}])
def test_padded_rows_equal_their_unpadded_runs(family: str, fields: dict[str, Any]) -> None:
    lengths = [303, 250, 117]
    batch = make_batch(lengths)
    model = extended(family, **fields)
    together = logits(model, batch, position_ids=positions_of(batch))
    for row, length in enumerate(lengths):
        single = logits(model, {"input_ids": batch["input_ids"][row : row + 1, -length:]})
        same(together[row, -length:], single[0])


@pytest.mark.parametrize("fields", [{}, {"method": "dense"}])
def test_chunks_equal_one_call(fields: dict[str, Any]) -> None:
    model = extended("llama", **fields)
    batch = make_batch([304])
    once = logits(model, batch)
    past = hip_hf.HiPCache(model.config)
    parts = []
    for start in range(0, 304, 80):
        end = min(start + 80, 304)
        ids, mask = batch["input_ids"][:, start:end], batch["attention_mask"][:, :end]
        at = torch.arange(start, end)[None]
        parts.append(
            logits(
                model,
                {"input_ids": ids, "attention_mask": mask},
                position_ids=at,
                past_key_values=past,
            )
        )
    same(torch.cat(parts, 1), once)


def generated(model: PreTrainedModel, batch: dict[str, torch.Tensor], **fields: Any) -> Any:
    generation = dict(
        do_sample=False, max_new_tokens=12, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        return model.generate(**batch, **{**generation, **fields})


def test_the_cache_generates_what_no_cache_does() -> None:
    """Dense: without a cache, rows select with their query block."""
    model, batch = extended("llama", method="dense"), make_batch([203, 150])
    expected = generated(model, batch)
    assert {row.cache for row in hip_hf.explain(model)} == {"pages"}
    for a, b in zip(generated(model, batch, use_cache=False).logits, expected.logits, strict=True):
        same(a, b)
    for other in ({"cache_implementation": "static"}, {"past_key_values": DynamicCache()}):
        with pytest.raises(
            ValueError,
            match=r"past_key_values: got a \w+Cache, allowed with extend='streaming': a HiPCache",
        ):
            generated(model, batch, **other)


def test_offloaded_pages_generate_the_same() -> None:
    model, batch = extended("llama"), make_batch([203])
    expected = generated(model, batch)
    cache = hip_hf.HiPCache(model.config, offload="cpu", device_pages=8)
    actual = generated(model, batch, past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(actual.logits, expected.logits, strict=True))


def test_beams_and_prompt_lookup_run() -> None:
    model, batch = extended("llama", budget=104), make_batch([100])
    expected = generated(model, batch)
    beams = generated(model, batch, num_beams=3)
    assert beams.sequences.shape == expected.sequences.shape
    looked_up = generated(model, batch, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up.sequences, expected.sequences)


def test_continuous_batching_gives_the_tokens_of_the_ordinary_path() -> None:
    model = extended("llama", budget=104)
    assert batched(model, prompts(), new=4) == alone(model, prompts(), new=4)


def test_continuous_batching_needs_a_patcher() -> None:
    model = extended("phi3")
    module, query = model.model.layers[0].self_attn, torch.zeros(1, 4, 2, 16)
    with pytest.raises(ValueError, match="continuous batching without a patcher"):
        extension.unrotate(
            extension.positions_of(module, hip_hf.HiPConfig(**SPARSE, extend="streaming")),
            query,
            query,
            object(),
        )


def test_sliding_layers_stay_as_they_are() -> None:
    """Their window is all they see, and the model was trained for it."""
    model, batch = make_model("mistral"), make_batch([300])
    model.config.sliding_window = 24
    expected = logits(model, batch)
    hip_hf.patch(model, extend="streaming")
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("patched", [True, False])
def test_caches_of_the_other_kind_are_refused(patched: bool) -> None:
    model, batch = make_model("llama"), make_batch([100])
    if patched:
        hip_hf.patch(model)
    cache = hip_hf.HiPCache(model.config)
    generated(model, batch, past_key_values=cache)
    model.config.hip["extend"] = "streaming"
    with pytest.raises(
        ValueError, match="filled with extend=None, allowed: with extend='streaming' an empty one"
    ):
        logits(model, make_batch([3]), past_key_values=cache)
    model.config.hip["extend"] = None
    hip_hf.patch(model, extend="streaming")
    cache = hip_hf.HiPCache(model.config)
    logits(model, batch, past_key_values=cache)
    model.config.hip["extend"] = None
    with pytest.raises(ValueError, match="got a cache filled with extend='streaming'"):
        logits(model, make_batch([3]), past_key_values=cache)
    cache.reset()
    logits(model, batch, past_key_values=cache)


def test_another_cache_is_refused_where_it_brings_keys() -> None:
    model, batch = extended("granite"), make_batch([100])
    cache = DynamicCache()
    logits(model, batch, past_key_values=cache)
    said = "got another one, whose keys are rotated, allowed with extend='streaming': a HiPCache"
    with pytest.raises(ValueError, match=said):
        logits(model, make_batch([3]), past_key_values=cache)


def test_a_saved_cache_knows_what_it_holds(tmp_path: Path) -> None:
    model, batch = extended("llama"), make_batch([203])
    cache, fresh = hip_hf.HiPCache(model.config), hip_hf.HiPCache(model.config)
    logits(model, batch, past_key_values=cache)
    cache.save(tmp_path / "cache")
    fresh.load(tmp_path / "cache")
    more = {"input_ids": make_batch([5], seed=1)["input_ids"]}
    assert torch.equal(
        logits(model, more, past_key_values=fresh), logits(model, more, past_key_values=cache)
    )
    fresh.load(tmp_path / "cache")
    model.config.hip["extend"] = None
    with pytest.raises(ValueError, match="got a cache filled with extend='streaming'"):
        logits(model, more, past_key_values=fresh)


def test_a_model_is_patched_as_it_is_loaded(tmp_path: Path) -> None:
    model, batch = extended("qwen3"), make_batch([203])
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hip")
    assert len(attention(again)) == 2
    assert torch.equal(logits(again, batch), expected)
    later = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    later.set_attn_implementation("hip")
    assert torch.equal(logits(later, batch), expected)
    hip_hf.configure(model, extend=None)
    model.save_pretrained(tmp_path)
    assert not attention(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hip"))


def fails(config: PreTrainedConfig, message: str, **fields: Any) -> None:
    """`configure` with `extend` says why not, and changes nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation("hip")
    hip_hf.configure(model, **SPARSE)
    before = copy.deepcopy(model.config.hip)
    with pytest.raises(ValueError, match=message):
        hip_hf.configure(model, extend="streaming", **fields)
    assert model.config.hip == before
    assert not attention(model)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 2.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            HunYuanDenseV1Config(**SMALL),
            "hunyuan_v1_dense has no patcher.*normalises q and k after RoPE",
        ),
        (SmolLM3Config(**SMALL), "some of its layers have no RoPE"),
        (
            FAMILIES["gpt_oss"],
            "gpt_oss has no patcher.*its layout of RoPE is not known; known are llama",
        ),
        (
            LlamaConfig(
                **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "type 'dynamic'.*length",
        ),
        (
            LlamaConfig(
                **SMALL, rope_parameters={**LONGROPE, "original_max_position_embeddings": 64}
            ),
            "type 'longrope': its frequencies switch",
        ),
    ],
    ids=["norm after RoPE", "layers without RoPE", "unknown", "dynamic", "longrope"],
)
def test_models_that_cannot_be_extended_say_why(config: PreTrainedConfig, message: str) -> None:
    fails(copy.deepcopy(config), message)


def test_what_a_row_reads_must_fit() -> None:
    fails(copy.deepcopy(PATCHED["llama"]), "sink . budget . window: got 136 keys", budget=112)
    fails(copy.deepcopy(PATCHED["llama"]), "got 136 keys", layers={1: {"budget": 112}})


def test_masks_with_holes_and_gradients_are_refused() -> None:
    model, batch = extended("llama"), make_batch([200])
    batch["attention_mask"][0, 50] = 0
    with pytest.raises(ValueError, match="padding in the middle of a row, allowed with `extend`"):
        logits(model, batch)
    with pytest.raises(ValueError, match="extend: got 'streaming' where gradients"):
        model(make_batch([200])["input_ids"])
