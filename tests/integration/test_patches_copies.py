"""Patched models that are copied, pickled, replicated, patched by others too, or one part of
several."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import PATCHED, make_batch, make_llava, make_model
from patched import attention, forwards, logits
from torch import nn
from transformers import PreTrainedModel

import hip_hf


def saved(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("extend", [None, "streaming"])
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("family", PATCHED)
def test_a_copy_of_a_patched_model_is_patched(family: str, copied: str, extend: str | None) -> None:
    """Also where it has run, and keeps tables and settings."""
    model, batch = make_model(family), make_batch([300])
    plain, own = logits(model, batch), forwards(model)
    hip_hf.patch(model, extend=extend)
    expected = logits(model, batch)
    other = COPIES[copied](model)
    for parameter in model.parameters():
        # a copy that still called the original's layers would give something else
        parameter.data.zero_()
    assert [layer.forward.module is layer for layer in attention(other)] == [True, True]
    assert torch.equal(logits(other, batch), expected)
    once = forwards(other)
    hip_hf.patch(other)
    assert forwards(other) == once
    hip_hf.unpatch(other)
    assert forwards(other) == own
    assert torch.equal(logits(other, batch), plain)


def test_a_pickle_has_no_tables_of_angles() -> None:
    """They are made anew, as long as the trained length."""
    model = make_model("llama", extend="streaming")
    before = len(pickle.dumps(model))
    logits(model, make_batch([300]))
    assert len(pickle.dumps(model)) - before < 10_000


def test_a_replica_for_another_device_calls_its_own_layers() -> None:
    """What `nn.DataParallel` makes of each module before every forward."""
    model, batch = make_model("llama"), make_batch([70])
    layer = model.model.layers[0].self_attn
    expected = logits(model, batch)
    hip_hf.patch(model)
    replica = layer._replicate_for_data_parallel()
    assert replica.forward.module is replica
    assert layer.forward.module is layer
    twice = nn.Linear(64, 64, bias=False)
    twice.weight.data = 2 * layer.o_proj.weight.data
    replica._modules["o_proj"] = twice  # as its parameters are put in place: in the replica alone
    hidden, around = torch.randn(1, 40, 64), model.model.rotary_emb
    with torch.no_grad():
        at = around(hidden, torch.arange(40)[None])
        (own, _), (copied, _) = (
            module(hidden, position_embeddings=at, attention_mask=None)
            for module in (layer, replica)
        )
    assert torch.equal(copied, 2 * own)
    hip_hf.unpatch(model)
    assert "forward" not in layer._replicate_for_data_parallel().__dict__
    assert torch.equal(logits(model, batch), expected)


def test_a_forward_that_another_put_in_its_place_is_patched_again() -> None:
    """`patch` is no silent no-op then, and `unpatch` gives back what it found."""
    model, batch, called = make_model("llama"), make_batch([70]), []
    expected = logits(model, batch)
    hip_hf.patch(model)
    layer = model.model.layers[0].self_attn
    ours = layer.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return ours(*args, **kwargs)

    layer.forward = other
    assert torch.equal(logits(model, batch), expected)
    assert len(called) == 1
    assert len(attention(model)) == 1
    hip_hf.patch(model)
    assert len(attention(model)) == 2
    assert torch.equal(logits(model, batch), expected)
    assert len(called) == 1
    model.set_attn_implementation("eager")
    eager = logits(model, batch)
    assert len(called) == 2
    assert torch.equal(eager, logits(make_model("llama", "eager"), batch))
    hip_hf.unpatch(model)
    assert layer.forward is other


@pytest.mark.parametrize("whole", [None, "eager"])
@pytest.mark.parametrize("text", ["sdpa", "eager", "hip"])
def test_only_the_text_part_of_a_model_of_several_is_patched(text: str, whole: str | None) -> None:
    names = {"text_config": text, "vision_config": "eager", **({"": whole} if whole else {})}
    model, batch = make_llava(names).eval(), make_batch([60])

    def found() -> list[str]:
        parts = (model.config, model.config.text_config, model.config.vision_config)
        return [part._attn_implementation for part in parts]

    before, own, expected = found(), forwards(model), logits(model, batch)
    assert before[1:] == [text, "eager"]
    hip_hf.patch(model, dense_below=0, budget=32)
    assert found() == [before[0], "hip", "eager"]
    assert len(attention(model)) == 2
    logits(model, batch)
    assert len(hip_hf.explain(model)) >= 2
    hip_hf.unpatch(model)
    assert found() == before
    assert forwards(model) == own
    assert torch.equal(logits(model, batch), expected)
