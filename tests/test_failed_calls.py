"""A call of a model that fails changes nothing: the next step on its cache is that of a cache which never met the failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from hip_hf import HiPCache
from hip_hf.integration import layer_attention

PROMPT, STEPS = 200, 9  # steps enough for a selection to be kept, and made anew

CACHES: dict[str, Callable[[Any], Any]] = {
    "paged": HiPCache,
    "offloaded": lambda config: HiPCache(config, offload="cpu", device_pages=8),
    "dynamic": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=PROMPT + STEPS),
}


def int_mask(rows: int, keys: int) -> torch.Tensor:
    return torch.ones(keys, keys, dtype=torch.int32).tril()[None, None, -rows:]


# what is wrong with a call of so many rows that sees so many keys, and what the error says
REFUSED: dict[str, tuple[Callable[[int, int], dict[str, Any]], str]] = {
    "output_attentions": (lambda rows, keys: dict(output_attentions=True), "output_attentions: got True, allowed: False"),
    "numbers": (
        lambda rows, keys: dict(attention_mask=torch.zeros(1, 1, rows, keys - 1)),
        r"attention_mask: got a torch.float32 tensor of shape .* of the caller's own",
    ),
    "integers": (lambda rows, keys: dict(attention_mask=int_mask(rows, keys)), r"attention_mask: got a .*torch.int32 tensor of "),
    "batch": (
        lambda rows, keys: dict(attention_mask=torch.ones(3, keys)),
        r"attention_mask: got shape \(3, \d+\) for a batch of 1",
    ),
    "boolean": (
        lambda rows, keys: dict(attention_mask=torch.ones(1, 1, rows, keys - 1, dtype=torch.bool)),
        r"attention_mask: got a torch.bool tensor of shape .* of the caller's own",
    ),
    "settings": (lambda rows, keys: dict(), r"HiPConfig.budget: got 7, allowed: "),
}


def step(model: PreTrainedModel, ids: torch.Tensor, cache: Any, at: int, rows: int = 1, **fields: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[:, at : at + rows], past_key_values=cache, **fields).logits


def check_steps(model: PreTrainedModel, ids: torch.Tensor, cache: Any, twin: Any, at: int) -> None:
    """Both caches give the same, to the bit."""
    for position in range(at, at + STEPS - 2):
        got, want = (step(model, ids, one, position) for one in (cache, twin))
        assert torch.equal(got, want), f"step at {position}"
        assert "sparse" in paths(model)
    for one in (cache, twin):
        assert {int(layer.get_seq_length()) for layer in one.layers} == {at + STEPS - 2}


def fail(model: PreTrainedModel, name: str, ids: torch.Tensor, cache: Any, at: int, rows: int = 1) -> None:
    wrong, message = REFUSED[name]
    before = model.config.hip
    if name == "settings":
        model.config.hip = {**before, "budget": 7}
    with pytest.raises(ValueError, match="^" + message):
        step(model, ids, cache, at, rows, **wrong(rows, at + rows))
    model.config.hip = before


def exhaust(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on there is no memory for the attention of layer 1."""

    def exhausted(problem: Any, config: Any, layer: int, *args: Any) -> Any:
        if layer == 1:
            raise torch.OutOfMemoryError("no memory")
        return attend(problem, config, layer, *args)

    attend = layer_attention.attend
    monkeypatch.setattr(layer_attention, "attend", exhausted)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_refused_step_leaves_the_cache(family: str, kind: str, name: str) -> None:
    """Gemma 2's first layer slides, and has dropped tokens for the step."""
    model, ids = make_model(family), make_batch([PROMPT + STEPS])["input_ids"]
    caches = [CACHES[kind](model.config) for _ in range(2)]
    for cache in caches:
        step(model, ids, cache, 0, PROMPT)
        step(model, ids, cache, PROMPT)
    fail(model, name, ids, caches[0], PROMPT + 1)
    check_steps(model, ids, *caches, PROMPT + 1)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", CACHES)
def test_a_refused_prompt_leaves_an_empty_cache(kind: str, name: str) -> None:
    """Which then takes any prompt, also of another batch size."""
    model, ids = make_model("llama"), make_batch([PROMPT + STEPS, PROMPT + STEPS])["input_ids"]
    cache, twin = (CACHES[kind](model.config) for _ in range(2))
    fail(model, name, ids[:1], cache, 0, PROMPT)
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(step(model, ids, cache, 0, PROMPT), step(model, ids, twin, 0, PROMPT))
    check_steps(model, ids, cache, twin, PROMPT)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_later_layer_that_fails(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers before it give up their new tokens as well, whatever the error."""
    model, ids = make_model("llama"), make_batch([PROMPT + STEPS])["input_ids"]
    caches = [CACHES[kind](model.config) for _ in range(2)]
    for cache in caches:
        step(model, ids, cache, 0, PROMPT)

    exhaust(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        step(model, ids, caches[0], PROMPT, rows)
    monkeypatch.undo()
    check_steps(model, ids, *caches, PROMPT)


def test_dropout_is_refused_without_a_trace() -> None:
    model, ids = make_model("llama"), make_batch([PROMPT + STEPS])["input_ids"]
    caches = [HiPCache(model.config) for _ in range(2)]
    for cache in caches:
        step(model, ids, cache, 0, PROMPT)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"^dropout: got 0\.1, allowed: 0"):
        step(model, ids, caches[0], PROMPT)
    check_steps(model.eval(), ids, *caches, PROMPT)


@pytest.mark.parametrize("kind", ["paged", "static"])
def test_what_cannot_be_taken_back_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2's second layer fails, and its first, which slides, no longer has what five new tokens pushed out."""
    model, ids = make_model("gemma2"), make_batch([PROMPT + STEPS])["input_ids"]
    cache = CACHES[kind](model.config)
    step(model, ids, cache, 0, PROMPT)
    exhaust(monkeypatch)
    message = r"^no memory; past_key_values: got one whose layer 0 \(\w*SlidingWindowLayer\) cannot .*, allowed: a new one$"
    with pytest.raises(ValueError, match=message):
        step(model, ids, cache, PROMPT, 5)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_layers_that_select_by_themselves_are_refused_with_the_reason(family: str) -> None:
    """And their cache, which also holds keys of their own search, is as it was: another attention goes on with it."""
    sizes = dict(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    latent = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
    index = dict(index_topk=16, index_n_heads=2, index_head_dim=16, num_key_value_heads=4, first_k_dense_replace=2)
    experts = dict(n_routed_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, n_group=1, topk_group=1)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **latent, **index, **experts, **tokens)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), make_batch([40])["input_ids"]
    caches = [DynamicCache(config=config) for _ in range(2)]
    for cache in caches:
        step(model, ids, cache, 0, 30)
    model.set_attn_implementation("hip")
    for cache, at in ((caches[0], 30), (DynamicCache(config=config), 0)):
        with pytest.raises(ValueError, match=r"^indices: \w+ passes the layer's own sparse indices, allowed: None$"):
            step(model, ids, cache, at, 5)
        assert cache.get_seq_length() == at
    model.set_attn_implementation("eager")
    got, want = (step(model, ids, cache, 30, 5) for cache in caches)
    assert torch.equal(got, want)
