"""Patched models under the libraries that reach into models: PEFT, accelerate's `device_map`,
quantised linear layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_batch, make_model
from patched import attention, logits
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hip_hf

FAMILIES = ["llama", "qwen3"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXTENDED = dict(extend="streaming")


def adapted(family: str) -> Any:
    """The family's model with a LoRA adapter whose weights are not zero; the same at every call."""
    peft = pytest.importorskip("peft", reason="pip install '.[test]'")
    model = make_model(family)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_either_side_of_the_patch(family: str) -> None:
    batch = make_batch([203, 90])
    model = adapted(family)
    expected, plain = logits(model, batch), logits(make_model(family), batch)
    assert not torch.equal(expected, plain), "the adapter does nothing"
    weights = list(model.state_dict())
    hip_hf.patch(model)
    assert len(attention(model)) == 2
    assert torch.equal(logits(model, batch), expected)
    assert list(model.state_dict()) == weights
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    hip_hf.unpatch(model)
    assert not attention(model)
    assert torch.equal(logits(model, batch), expected)
    hip_hf.patch(model)
    freed = model.unload()  # the layers are replaced again, below the patch
    assert len(attention(freed)) == 2
    assert torch.equal(logits(freed, batch), plain)


def test_a_merged_adapter_extends_as_the_adapter_does() -> None:
    batch = make_batch([500])
    model = adapted("llama")
    hip_hf.configure(model, **EXTENDED)
    assert len(attention(model)) == 2
    apart = logits(model, batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), apart, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(apart, logits(adapted("llama"), batch), atol=1e-2), (
        "the context was not extended"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_trains_with_the_same_bits(checkpointing: bool) -> None:
    batch, found = make_batch([90, 50]), []
    for patched in (False, True):
        model = adapted("llama").train()
        if patched:
            hip_hf.patch(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(**batch, use_cache=False).logits.float().square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 2 * 2 * len(PROJECTIONS)
    assert all(grad.any() for grad in found[0].values())
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


def mapped(folder: Path) -> PreTrainedModel:
    """A saved model, one of its two layers kept on disk: accelerate brings it to the CPU when it is
    called."""
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="hip", device_map=places, offload_folder=folder / "offloaded"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, EXTENDED])
def test_a_device_map_with_a_layer_on_disk(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    batch, source = make_batch([303, 90]), make_model(family)
    hip_hf.configure(source, **settings)
    expected = logits(source, batch)
    source.save_pretrained(tmp_path)
    model = mapped(tmp_path)
    away = model.model.layers[1].self_attn
    assert {p.device.type for p in away.parameters()} == {"meta"}
    assert len(attention(model)) == (2 if settings else 0), (
        "patched as it is loaded, if its settings need it"
    )
    assert torch.equal(logits(model, batch), expected)
    hip_hf.patch(model)
    for _ in range(2):
        assert torch.equal(logits(model, batch), expected)
    assert {p.device.type for p in away.parameters()} == {"meta"}, (
        "the hook no longer takes the layer away again"
    )
    if not settings:
        hip_hf.unpatch(model)
        assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, EXTENDED])
def test_quantised_linear_layers(family: str, settings: dict[str, Any]) -> None:
    def quantised(patched: bool) -> PreTrainedModel:
        model = make_model(family)
        if patched:
            hip_hf.patch(model, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that this will move to torchao
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    batch = make_batch([303, 90])
    before, after = quantised(True), quantised(False)
    assert not isinstance(before.model.layers[0].self_attn.q_proj, nn.Linear)
    expected = logits(after, batch)
    hip_hf.patch(after, **settings)
    assert len(attention(before)) == len(attention(after)) == 2
    assert torch.equal(logits(before, batch), logits(after, batch))
    assert torch.equal(logits(after, batch), expected) == (not settings)
    assert not torch.equal(expected, logits(make_model(family), batch)), "nothing was quantised"
