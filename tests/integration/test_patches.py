"""Patched models: the same bits as the registered attention, and nothing else of the model has
changed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from continuous import batched, prompts
from families import _BASE, PATCHED, make_batch, make_model
from patched import attention, forwards, logits
from repository import ROOT
from torch import nn
from transformers import AutoModelForCausalLM, Olmo2Config

import hip_hf
from hip_hf.integration import patched_forward as forward
from hip_hf.integration.patches import families


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attention classes whose patched forward ran."""
    seen: list[str] = []
    original = forward.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(forward, "forward", counted)
    return seen


@pytest.mark.fast
@pytest.mark.parametrize("family", PATCHED)
def test_same_bits_as_the_registered_attention(family: str, calls: list[str]) -> None:
    model = make_model(family)
    batch = make_batch([203, 150, 3])
    generation = dict(
        do_sample=False, max_new_tokens=9, output_logits=True, return_dict_in_generate=True
    )

    def run() -> list[torch.Tensor]:
        found = [logits(model, batch)]
        for cache in (None, hip_hf.HiPCache(model.config)):
            with torch.no_grad():
                out = model.generate(**batch, **generation, past_key_values=cache)
            found += [out.sequences, *out.logits]
        return found

    expected = run()
    assert not calls
    hip_hf.patch(model)
    actual = run()
    assert len(calls) == 2 * (1 + 2 * 9)
    assert set(calls) == {families.patcher_for(model.config.model_type).attention}
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", PATCHED)
def test_same_bits_in_continuous_batching(family: str, calls: list[str]) -> None:
    """Of every call's logits, in the same order: the scheduler knows nothing of patches."""
    model, given = make_model(family), prompts()[:4]
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    tokens = batched(model, given, new=3)
    expected, seen[:] = list(seen), []
    assert not calls
    hip_hf.patch(model)
    assert batched(model, given, new=3) == tokens
    assert set(calls) == {families.patcher_for(model.config.model_type).attention}
    assert len(seen) == len(expected) > 3
    for a, b in zip(seen, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["streaming", "hyper"])
def test_names_that_force_a_method_do_so(name: str) -> None:
    model = make_model("llama", name)
    batch = make_batch([90])
    expected = logits(model, batch)
    hip_hf.patch(model)
    assert torch.equal(logits(model, batch), expected)
    assert {row.method for row in hip_hf.explain(model)} == {name}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2_moe"])
def test_a_patched_model_that_attends_otherwise_is_the_original(
    family: str, calls: list[str]
) -> None:
    model = make_model(family)
    batch = make_batch([60, 40])
    model.set_attn_implementation("eager")
    expected = logits(model, batch)
    hip_hf.patch(model)
    assert model.config._attn_implementation == "hip"
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model, batch), expected)
    assert calls


@pytest.mark.fast
def test_unpatch_restores_the_model_exactly() -> None:
    model = make_model("llama", "sdpa")
    batch = make_batch([60, 40])
    del model.config.hip
    before, dicts, config = (
        forwards(model),
        [set(m.__dict__) for m in model.modules()],
        copy.deepcopy(model.config),
    )
    expected, weights = logits(model, batch), copy.deepcopy(model.state_dict())
    hip_hf.patch(model, hip_hf.HiPConfig(budget=32), dense_below=0)
    assert model.config._attn_implementation == "hip"
    assert model.config.hip["budget"] == 32
    assert not torch.equal(logits(model, batch), expected)
    assert model.state_dict().keys() == weights.keys()
    hip_hf.unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config.to_dict()
    assert forwards(model) == before
    kept = {"_hip_call", "_hip_settings"}  # what `explain` and the settings remember
    assert [set(m.__dict__) - kept for m in model.modules()] == dicts
    assert torch.equal(logits(model, batch), expected)
    hip_hf.unpatch(model)
    assert forwards(model) == before


def test_patching_twice_is_harmless() -> None:
    model = make_model("qwen3")
    batch = make_batch([90])
    expected = logits(model, batch)
    before = forwards(model)
    hip_hf.patch(model)
    once = forwards(model)
    hip_hf.patch(model, budget=48)
    assert forwards(model) == once
    assert model.config.hip["budget"] == 48
    hip_hf.unpatch(model)
    assert forwards(model) == before
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_other_families_are_refused_by_name(family: str) -> None:
    model = make_model(family)
    before, settings = forwards(model), copy.deepcopy(model.config.hip)
    with pytest.raises(
        ValueError, match=r"got model type .*llama \| mistral \| qwen2 .*docs/patchers.md"
    ):
        hip_hf.patch(model, budget=64)
    assert forwards(model) == before
    assert model.config.hip == settings


def test_bad_settings_change_nothing() -> None:
    model = make_model("llama")
    before, settings = forwards(model), copy.deepcopy(model.config.hip)
    with pytest.raises(ValueError, match="budget: got 7"):
        hip_hf.patch(model, budget=7)
    assert forwards(model) == before
    assert model.config.hip == settings


@pytest.mark.parametrize("hook_first", [True, False])
def test_hooks_of_accelerate_stay_around_a_patched_layer(
    hook_first: bool, calls: list[str]
) -> None:
    """`device_map` puts them there: inputs are moved before the layer, whoever its forward is."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):
        count = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return args, kwargs

    model, hook, batch = make_model("llama"), Counting(), make_batch([70])
    expected = logits(model, batch)
    layer = model.model.layers[0].self_attn
    if hook_first:
        hooks.add_hook_to_module(layer, hook)
    hip_hf.patch(model)
    if not hook_first:
        hooks.add_hook_to_module(layer, hook)
    assert torch.equal(logits(model, batch), expected)
    assert (hook.count, len(calls)) == (1, 2)
    hip_hf.unpatch(model)
    assert torch.equal(logits(model, batch), expected)
    assert (hook.count, len(calls)) == (2, 2)
    hooks.remove_hook_from_module(layer)
    assert torch.equal(logits(model, batch), expected)
    assert (hook.count, len(calls)) == (2, 2)


def test_torch_hooks_and_replaced_layers_are_called() -> None:
    """Adapters and quantised linear layers are modules in the place of `q_proj` and its like."""

    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0
            self.down, self.up = nn.Linear(inner.in_features, 2), nn.Linear(2, inner.out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.inner(x) + self.up(self.down(x))

    model, batch = make_model("qwen2"), make_batch([70])
    hip_hf.patch(model)
    layer = model.model.layers[0].self_attn
    plain = logits(model, batch)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for name in names:
        setattr(layer, name, Adapted(getattr(layer, name)))
    seen: list[int] = []
    layer.register_forward_hook(lambda *args: seen.append(1))
    patched = logits(model, batch)
    assert not torch.equal(patched, plain)
    assert [getattr(layer, name).calls for name in names] == [1, 1, 1, 1]
    assert seen == [1]
    hip_hf.unpatch(model)
    assert torch.equal(logits(model, batch), patched)


def test_state_dict_deepcopy_and_save(tmp_path: Any) -> None:
    model, batch = make_model("llama"), make_batch([90])
    names = list(model.state_dict())
    hip_hf.patch(model)
    assert list(model.state_dict()) == names
    expected = logits(model, batch)
    other = copy.deepcopy(model)
    assert len(attention(other)) == 2
    for module in attention(other):
        assert module.forward.module is module
    model.lm_head.weight.data.zero_()
    assert torch.equal(logits(other, batch), expected)
    other.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hip")
    assert not attention(again)
    assert torch.equal(logits(again, batch), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_gradients_and_checkpointing_give_the_same_bits(family: str) -> None:
    batch = make_batch([90, 50])

    def gradients(patched: bool, checkpointing: bool) -> list[torch.Tensor]:
        model = make_model(family).train()
        if patched:
            hip_hf.patch(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, use_cache=False).logits.float().square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for checkpointing in (False, True):
        expected, actual = (gradients(patched, checkpointing) for patched in (False, True))
        assert len(actual) == len(expected) > 10
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_the_patcher_of_the_docs(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """The page on writing patchers has a whole one: run as it stands there."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    monkeypatch.setitem(PATCHED, "olmo2", Olmo2Config(**_BASE))
    model, batch = make_model("olmo2"), make_batch([90, 50])
    expected = logits(model, batch)
    with pytest.raises(ValueError, match="got model type 'olmo2'"):
        hip_hf.patch(model)
    page = (ROOT / "docs" / "patchers.md").read_text()
    assert len(page.splitlines()) < 80
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {})
    assert "olmo2" in families.families()
    hip_hf.patch(model)
    assert torch.equal(logits(model, batch), expected)
    assert calls == ["Olmo2Attention"] * 2
    with pytest.raises(ValueError, match="model_type: got 'olmo2', allowed: one without a patcher"):
        exec(code, {})


def test_patcher_files_are_short() -> None:
    for path in Path(families.__file__).parent.glob("*.py"):
        if path.stem != "forward":
            assert len(path.read_text().splitlines()) < 80, path.name
