"""A call of a model that fails: what is known before any layer changes no cache; what fails later
leaves a `HiPCache` that says so at its next use, and is as a new one after `reset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from sweep import build
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from hip_hf import HiPCache, patch
from hip_hf.integration import decode_fast_path, layer_attention

PROMPT, STEPS = 200, 9  # steps enough for a selection to be kept, and made anew

CACHES: dict[str, Callable[[Any], Any]] = {
    "paged": HiPCache,
    "offloaded": lambda config: HiPCache(config, offload="cpu", device_pages=8),
    "dynamic": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=PROMPT + STEPS),
}


def int_mask(rows: int, keys: int) -> torch.Tensor:
    return torch.ones(keys, keys, dtype=torch.int32).tril()[None, None, -rows:]


USED = (
    r"^past_key_values: got a cache .*, allowed: `reset\(\)` before it is used again, or a new one$"
)
EARLY = ("batch", "settings")  # of `REFUSED`: what the mask function knows

# what is wrong with a call, made from its numbers of rows and of keys, and what the error says
REFUSED: dict[str, tuple[Callable[[int, int], dict[str, Any]], str]] = {
    "output_attentions": (
        lambda rows, keys: dict(output_attentions=True),
        "output_attentions: got True, allowed: False",
    ),
    "numbers": (
        lambda rows, keys: dict(attention_mask=torch.zeros(1, 1, rows, keys - 1)),
        r"attention_mask: got a torch.float32 tensor of shape .* for 1 rows of",
    ),
    "integers": (
        lambda rows, keys: dict(attention_mask=int_mask(rows, keys)),
        r"attention_mask: got a .*torch.int32 tensor.*, allowed: a 2-D mask",
    ),
    "batch": (
        lambda rows, keys: dict(attention_mask=torch.ones(3, keys)),
        r"attention_mask: got shape \(3, \d+\) for a batch of 1",
    ),
    "boolean": (
        lambda rows, keys: dict(attention_mask=torch.ones(1, 1, rows, keys - 1, dtype=torch.bool)),
        r"attention_mask: got a torch.bool tensor of shape .* for 1 rows of",
    ),
    "settings": (lambda rows, keys: dict(), r"HiPConfig.budget: got 7, allowed: "),
}


def step(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any, at: int, rows: int = 1, **fields: Any
) -> torch.Tensor:
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


def fail(
    model: PreTrainedModel, name: str, ids: torch.Tensor, cache: Any, at: int, rows: int = 1
) -> None:
    wrong, message = REFUSED[name]
    before = model.config.hip
    if name == "settings":
        model.config.hip = {**before, "budget": 7}
    with pytest.raises(ValueError, match="^" + message):
        step(model, ids, cache, at, rows, **wrong(rows, at + rows))
    model.config.hip = before


def exhaust(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """From now on there is no memory for the attention of the layer `failing`."""

    def exhausted(problem: Any, config: Any, layer: int, *args: Any) -> Any:
        if layer == failing:
            raise torch.OutOfMemoryError("no memory")
        return attend(problem, config, layer, *args)

    attend = layer_attention.attend
    monkeypatch.setattr(layer_attention, "attend", exhausted)
    monkeypatch.setattr(decode_fast_path, "attend", exhausted)
    monkeypatch.setattr(decode_fast_path, "buffered_rows", lambda *args: None)


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_that_is_refused_before_any_layer_leaves_the_cache(
    family: str, kind: str, name: str
) -> None:
    """Gemma 2's first layer slides."""
    model, ids = make_model(family), make_batch([PROMPT + STEPS])["input_ids"]
    caches = [CACHES[kind](model.config) for _ in range(2)]
    for cache in caches:
        step(model, ids, cache, 0, PROMPT)
        step(model, ids, cache, PROMPT)
    fail(model, name, ids, caches[0], PROMPT + 1)
    check_steps(model, ids, *caches, PROMPT + 1)


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("kind", CACHES)
def test_a_prompt_that_is_refused_before_any_layer_leaves_an_empty_cache(
    kind: str, name: str
) -> None:
    """Which then takes any prompt, also of another batch size."""
    model, ids = make_model("llama"), make_batch([PROMPT + STEPS, PROMPT + STEPS])["input_ids"]
    cache, twin = (CACHES[kind](model.config) for _ in range(2))
    fail(model, name, ids[:1], cache, 0, PROMPT)
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(step(model, ids, cache, 0, PROMPT), step(model, ids, twin, 0, PROMPT))
    check_steps(model, ids, cache, twin, PROMPT)


def check_unusable(model: PreTrainedModel, ids: torch.Tensor, cache: HiPCache, path: Path) -> None:
    """The cache says so, before any layer, until it is reset: then it is as a new one, also for
    another batch size."""
    lengths = [layer.get_seq_length() for layer in cache.layers]
    for _ in range(2):
        with pytest.raises(ValueError, match=USED):
            step(model, ids, cache, int(cache.get_seq_length()))
    with pytest.raises(ValueError, match=USED):
        cache.save(path)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    cache.reset()
    twin, ids = CACHES["paged"](model.config), ids.expand(2, -1)
    assert torch.equal(step(model, ids, cache, 0, PROMPT), step(model, ids, twin, 0, PROMPT))
    check_steps(model, ids, cache, twin, PROMPT)


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in EARLY])
@pytest.mark.parametrize("kind", ["paged", "offloaded"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_refused_later_leaves_a_cache_that_says_so(
    family: str, kind: str, name: str, tmp_path: Path
) -> None:
    model, ids = make_model(family), make_batch([PROMPT + STEPS])["input_ids"]
    cache = CACHES[kind](model.config)
    step(model, ids, cache, 0, PROMPT)
    fail(model, name, ids, cache, PROMPT)
    check_unusable(model, ids, cache, tmp_path / "cache")


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("family", "patched"), [("llama", False), ("llama", True), ("gemma2", False)]
)
def test_a_layer_that_fails(
    family: str,
    rows: int,
    patched: bool,
    failing: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any layer, also the last one, with any error."""
    model, ids = make_model(family), make_batch([PROMPT + STEPS])["input_ids"]
    if patched:
        patch(model)
    cache = HiPCache(model.config)
    step(model, ids, cache, 0, PROMPT)
    exhaust(monkeypatch, failing)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        step(model, ids, cache, PROMPT, rows)
    monkeypatch.undo()
    check_unusable(model, ids, cache, tmp_path / "cache")


@pytest.mark.parametrize("name", ["deepseek_v3", "jetmoe", "falcon_h1", "zamba2"])
def test_a_layer_fails_whose_keys_are_made_anew_or_that_also_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys are not those that the cache returned; there is a running state beside them."""
    model, ids = build("causal", name, "hip"), make_batch([60])["input_ids"]
    cache = HiPCache(model.config)
    want = step(model, ids, cache, 0, 40)

    def exhausted(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(layer_attention, "attend", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        step(model, ids, cache, 40)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=USED):
        step(model, ids, cache, 40)
    cache.reset()
    assert torch.equal(step(model, ids, cache, 0, 40), want)


def test_a_file_gives_an_unusable_cache_its_contents_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model("llama"), make_batch([PROMPT + STEPS])["input_ids"]
    cache, twin = HiPCache(model.config), HiPCache(model.config)
    step(model, ids, cache, 0, PROMPT)
    cache.save(tmp_path / "cache")
    twin.load(tmp_path / "cache")
    exhaust(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        step(model, ids, cache, PROMPT)
    monkeypatch.undo()
    cache.load(tmp_path / "cache")
    check_steps(model, ids, cache, twin, PROMPT)


def test_dropout_is_refused(tmp_path: Path) -> None:
    model, ids = make_model("llama"), make_batch([PROMPT + STEPS])["input_ids"]
    cache = HiPCache(model.config)
    step(model, ids, cache, 0, PROMPT)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"^dropout: got 0\.1, allowed: 0"):
        step(model, ids, cache, PROMPT)
    check_unusable(model.eval(), ids, cache, tmp_path / "cache")


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_layers_that_select_by_themselves_are_refused_with_the_reason(family: str) -> None:
    """And their cache, which also holds keys of their own search, is as it was: another attention
    goes on with it."""
    sizes = dict(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    latent = dict(
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16
    )
    index = dict(
        index_topk=16,
        index_n_heads=2,
        index_head_dim=16,
        num_key_value_heads=4,
        first_k_dense_replace=2,
    )
    experts = dict(
        n_routed_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, n_group=1, topk_group=1
    )
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **latent, **index, **experts, **tokens)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), make_batch([40])["input_ids"]
    caches = [DynamicCache(config=config) for _ in range(2)]
    for cache in caches:
        step(model, ids, cache, 0, 30)
    model.set_attn_implementation("hip")
    for cache, at in ((caches[0], 30), (DynamicCache(config=config), 0)):
        with pytest.raises(
            ValueError, match=r"^indices: \w+ passes the layer's own sparse indices, allowed: None$"
        ):
            step(model, ids, cache, at, 5)
        assert cache.get_seq_length() == at
    model.set_attn_implementation("eager")
    got, want = (step(model, ids, cache, 30, 5) for cache in caches)
    assert torch.equal(got, want)
