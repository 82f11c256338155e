"""Masks that reach a layer: ours, copies of ours, and callers' own. What cannot be told apart is
refused, never guessed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from families import _BASE, SPARSE, VOCAB, make_batch, make_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BigBirdPegasusConfig,
    BigBirdPegasusForCausalLM,
    OlmoeConfig,
)
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import hip_hf
from hip_hf.integration.attention_function import attention_forward
from hip_hf.integration.masks import LAST, PAD, hip_mask

KEYS = 50

NOT_OURS: dict[str, torch.Tensor] = {
    "triangle": torch.ones(KEYS, KEYS, dtype=torch.int32).tril()[None, None],
    "long triangle": torch.ones(KEYS, KEYS, dtype=torch.int64).tril()[None, None],
    "too few keys": torch.arange(30, dtype=torch.int32)[None, None, None],
    "all in sight": torch.ones(1, 1, 1, KEYS, dtype=torch.int32),
    "0 and 1": (torch.arange(KEYS) >= 7).int()[None, None, None],
    "longs": torch.arange(KEYS)[None, None, None],
    "another batch": torch.arange(KEYS, dtype=torch.int32).expand(3, 1, 1, KEYS),
    "a mask for each head": torch.arange(KEYS, dtype=torch.int32).expand(1, 4, 1, KEYS),
    "too few numbers": torch.zeros(1, 1, KEYS, 30),
    "packed longs": torch.tensor([LAST] * 20 + [LAST + 2] * 30)[None, None, None],
    "too few boolean keys": torch.ones(1, 1, KEYS, 30, dtype=torch.bool),
    "too many boolean keys": torch.ones(1, 1, KEYS, 60, dtype=torch.bool),
    "other boolean rows": torch.ones(1, 1, 49, KEYS, dtype=torch.bool),
    "another boolean batch": torch.ones(2, 1, KEYS, KEYS, dtype=torch.bool),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", NOT_OURS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_mask_that_is_not_ours_is_refused(family: str, name: str) -> None:
    model = make_model(family)
    with (
        pytest.raises(ValueError, match=r"^attention_mask: got a.* tensor.*, allowed: "),
        torch.no_grad(),
    ):
        model(make_batch([KEYS])["input_ids"], attention_mask=NOT_OURS[name])


@pytest.mark.parametrize("rows", [3, 2])
def test_a_padding_mask_of_another_batch_is_refused(rows: int) -> None:
    ids = make_batch([KEYS] * (1 if rows == 3 else 3))["input_ids"]
    said = rf"^attention_mask: got shape \({rows}, {KEYS}\) for a batch of {len(ids)}, allowed: "
    with pytest.raises(ValueError, match=said):
        make_model("llama")(ids, attention_mask=torch.ones(rows, KEYS))


@pytest.mark.fast
@pytest.mark.parametrize("tokens", [[180], [180, 133]])
@pytest.mark.parametrize("hole", [False, True])
def test_a_copy_of_our_mask_serves_as_the_mask_does(tokens: list[int], hole: bool) -> None:
    """A copy loses what was attached to the mask, but it still says all that is needed, padding
    within a row included."""
    model, batch = make_model("llama"), make_batch(tokens)
    padding = batch["attention_mask"].bool()
    padding[0, 100:104] = not hole
    mask = hip_mask(len(tokens), 180, 180, 0, 0, causal_mask_function, padding, model.config)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        want = model(batch["input_ids"], attention_mask=mask).logits
        got = model(batch["input_ids"], attention_mask=mask.clone()).logits
    assert torch.equal(got, want)
    assert [row.path for row in hip_hf.explain(model)] == ["dense" if hole else "sparse"] * 2
    moved = mask.clone()
    moved[0, 0, 0, 150] += 1  # one key out of its place
    with pytest.raises(
        ValueError, match=r"^attention_mask: got a 4-D torch.int32 tensor, allowed: "
    ):
        model(batch["input_ids"], attention_mask=moved)


def test_a_mask_that_hides_everything_is_a_copy_like_any_other() -> None:
    model = make_model("llama")
    with torch.no_grad():
        logits = model(
            make_batch([KEYS])["input_ids"],
            attention_mask=torch.full((1, 1, 1, KEYS), PAD, dtype=torch.int32),
        ).logits
    assert logits.isfinite().all()
    assert {row.reason for row in hip_hf.explain(model)} == {"no row has a key"}


@pytest.mark.parametrize("window", [None, 100])
def test_the_window_of_the_mask_wins(window: int | None) -> None:
    """Also where it has none: a layer may name a window that its model's masks do not have."""
    module = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 180, 16), torch.randn(1, 2, 180, 16)
    pattern = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    mask = hip_mask(1, 180, 180, 0, 0, pattern, local_size=window)
    outs = [
        attention_forward(module, q, k, k, mask, sliding_window=given)[0]
        for given in (None, 60, 100)
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    alone = attention_forward(module, q, k, k, mask.clone(), sliding_window=window)[
        0
    ]  # a copy: the layer's word counts
    assert torch.equal(alone, outs[0])
    other = attention_forward(module, q, k, k, mask.clone(), sliding_window=60)[0]
    assert not torch.equal(other, outs[0])


def logits(model: Any, implementation: str, **batch: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**batch).logits


def test_a_window_that_only_the_layers_name_hides_nothing() -> None:
    """OLMoE's layers pass `config.sliding_window` on; its masks have none, so neither has eager
    attention."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        **{key: value for key, value in _BASE.items() if key != "head_dim"},
        num_experts=4,
        num_experts_per_tok=2,
    )
    config.sliding_window = 40
    model = AutoModelForCausalLM.from_config(config).eval()
    hip_hf.configure(model, **{**SPARSE, "budget": 512})
    batch = make_batch([150, 111])
    real = batch["attention_mask"].bool()
    got, want = (logits(model, name, **batch)[real] for name in ("hip", "eager"))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_causal_mask_makes_a_layer_causal() -> None:
    """Whatever the layer says of itself."""
    module = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(2, 4, 180, 16), torch.randn(2, 2, 180, 16)
    padding = make_batch([180, 133])["attention_mask"].bool()
    mask = hip_mask(2, 180, 180, 0, 0, causal_mask_function, padding)
    got, want = (
        attention_forward(module, q, k, k, mask, is_causal=causal)[0] for causal in (False, True)
    )
    assert torch.equal(got, want)
    assert module._hip_call.path == "sparse"


BIGBIRD = BigBirdPegasusConfig(
    vocab_size=VOCAB, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=256,
)  # fmt: skip


def test_the_decoder_of_bigbird_pegasus() -> None:
    """Its self-attention calls itself not causal and gets a causal mask."""
    torch.manual_seed(0)
    model = BigBirdPegasusForCausalLM(copy.deepcopy(BIGBIRD)).eval()
    hip_hf.configure(model, **{**SPARSE, "budget": 512})
    batch = make_batch([150, 111])
    real = batch["attention_mask"].bool()
    got, want = (logits(model, name, **batch)[real] for name in ("hip", "eager"))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    decoder = [layer.self_attn for layer in model.model.decoder.layers]
    assert [(module._hip_call.path, module._hip_call.reason) for module in decoder] == [
        ("sparse", "")
    ] * 2


def test_masks_of_ours_never_reach_attention_of_its_own() -> None:
    """The encoder of BigBird-Pegasus would add our boolean mask as numbers."""
    with pytest.raises(
        ValueError, match=r"attn_implementation: got 'hip' for model type 'bigbird_pegasus'"
    ):
        AutoModelForSeq2SeqLM.from_config(copy.deepcopy(BIGBIRD), attn_implementation="hip")


def test_compressed_layers_are_refused() -> None:
    """DeepSeek-V4 puts compressed keys behind the others, and extends the mask for them."""
    sizes = dict(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        n_routed_experts=4,
    )
    more = dict(
        moe_intermediate_size=32,
        num_experts_per_tok=2,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        index_n_heads=2,
    )
    ids = dict(index_head_dim=16, index_topk=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model("deepseek_v4", **sizes, **more, **ids)
    assert any("compressed" in kind for kind in config.layer_types)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hip").eval()
    said = "^attn_implementation: got 'hip' for model type 'deepseek_v4' with compressed layers"
    with pytest.raises(ValueError, match=said):
        model(torch.randint(3, 90, (1, 40)))


NAMED = {
    "falcon": dict(hidden_size=64, num_hidden_layers=1),
    "gpt_neo": dict(hidden_size=64, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]),
    "gptj": dict(n_embd=64, n_layer=1, n_head=4, rotary_dim=8),
}


@pytest.mark.parametrize("name", NAMED)
def test_attention_classes_by_name_have_none_of_ours(name: str) -> None:
    """They are refused before a layer is made, where Transformers would end in a `KeyError`."""
    with pytest.raises(
        ValueError, match=rf"attn_implementation: got 'hip' for model type '{name}', allowed: eager"
    ):
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(name, vocab_size=100, **NAMED[name]), attn_implementation="hip"
        )
