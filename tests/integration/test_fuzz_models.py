"""Fuzzing: padding masks of any kind, and calls of a model on a cache, against the same model with
eager attention."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from fuzz_cases import Draw, cases, configs
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hip_hf

VOCAB, MOST = 32, 64


@cache
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny Llama with `hip`, and the same with eager attention."""
    sizes = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=VOCAB, **sizes), attn_implementation="eager"
    ).eval()
    for parameter in eager.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(10)  # so that tokens matter to one another
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("hip")
    return ours, eager


@st.composite
def masks(draw: Draw, batch: int, tokens: int) -> torch.Tensor | None:
    """No mask, padding on either side, holes anywhere, nothing but padding."""
    kind = draw(st.sampled_from(["none", "left", "right", "holes", "all"]))
    if kind == "none":
        return None
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(batch):
        count = draw(st.integers(0, tokens))
        if kind == "left":
            mask[row, :count] = 0
        elif kind == "right":
            mask[row, tokens - count :] = 0
        elif kind == "holes":
            mask[row, draw(st.lists(st.integers(0, tokens - 1), max_size=5))] = 0
        elif draw(st.booleans()):
            mask[row] = 0
    return mask


@cases(0.05)
@given(data=st.data())
def test_masks_and_calls(data: Any) -> None:
    """What follows real tokens is what eager attention gives, whatever the mask and however the
    tokens come."""
    config = data.draw(
        configs(covers=True, methods=("hip", "staged", "quest", "oracle", "h2o", "dense"))
    )
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, MOST))
    mask = data.draw(masks(batch, tokens))
    counts = data.draw(st.lists(st.sampled_from([1, 1, 2, 16, 17, 30, -1, -9]), max_size=5))
    ids = torch.randint(
        VOCAB,
        (batch, tokens),
        generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**16))),
    )
    ours, eager = models()
    hip_hf.configure(ours, config, dense_layers=0)
    caches = [hip_hf.HiPCache(ours.config), None]
    from transformers import DynamicCache

    caches[1] = DynamicCache(config=eager.config)
    at = 0
    for count in (*counts, tokens):
        if count < 0:  # tokens that are taken back
            count = -min(-count, at)
            if count:
                for one in caches:
                    one.crop(count)
            at += count
            continue
        end = min(at + count, tokens)
        if end == at:
            continue
        seen = None if mask is None else mask[:, :end]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of padding in the middle of a row
            got, want = (
                model(ids[:, at:end], attention_mask=seen, past_key_values=one).logits
                for model, one in zip((ours, eager), caches, strict=True)
            )
        real = (
            torch.ones(batch, end - at, dtype=torch.bool)
            if mask is None
            else mask[:, at:end].bool()
        )
        assert got.isfinite().all()
        torch.testing.assert_close(got[real], want[real], atol=2e-3, rtol=2e-3)
        at = end
