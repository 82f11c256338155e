"""Layers of one model may lie on several devices: what attention makes lies where the layer is,
never on the default device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_batch, make_model, paths
from helpers import make_qkv, small
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

import hip_hf
from hip_hf import workers
from hip_hf.backends.torch import block_sparse
from hip_hf.backends.triton.hyper import Level
from hip_hf.integration import extension
from hip_hf.methods import hyper
from hip_hf.registry import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")  # the default device is one of a thread's own

HYPER: dict[str, Any] = {
    "method": "hyper",
    "options": {"min_seq_len": 24, "block_size": 16, "sample_size": 10},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "hip": {},
    "sampled vote, per head": {"vote": "sampled", "group_shared": False},
    "rescored, from coarse": {"rescore": 2, "coarsest": 64},
    **{name: {"method": name} for name in METHODS if name != "hip"},
    "hyper": HYPER,
    "delta": {"delta": 16},
}


@contextmanager
def elsewhere() -> Iterator[None]:
    """A tensor that is made without a device holds nothing, and fails beside those that do. What is
    kept for all calls is made anew."""
    for kept in (extension._ropes, block_sparse._triangles, workers.scratch.buffers):
        kept.clear()
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(before)


def attended(
    given: list[list[torch.Tensor]], key_start: torch.Tensor, config: hip_hf.HiPConfig
) -> list[torch.Tensor]:
    """Output and log-sum-exp of calls that share their state."""
    state, found = hip_hf.DecodeState(), []
    for q, k, v in given:
        found += hip_hf.hip_attention(
            q, k, v, config=config, key_start=key_start, state=state, return_lse=True
        )
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_makes_nothing_on_the_default_device(name: str) -> None:
    """A padded prompt and steps after it, with what is kept between them."""
    config = small(**{"dense_layers": 0, **SETTINGS[name]})
    tokens, steps = 120, 2
    q, k, v = make_qkv(tokens + steps, batch=2)
    given = [[q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens]]]
    for end in range(tokens + 1, tokens + steps + 1):
        given.append([q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end]])
    key_start = torch.tensor([0, 37])
    expected = attended(given, key_start, config)
    with elsewhere():
        found = attended(given, key_start, config)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_mask_and_gradients_are_where_the_tensors_are() -> None:
    inputs = [x.requires_grad_() for x in make_qkv(100)]
    config = small()

    def learned() -> list[torch.Tensor]:
        out, mask = hip_hf.hip_attention(*inputs, config=config, return_mask=True)
        return [
            mask.indices,
            mask.counts,
            mask.first,
            *torch.autograd.grad(out.square().sum(), inputs),
        ]

    expected = learned()
    with elsewhere():
        found = learned()
    assert all(map(torch.equal, found, expected))


def conversation(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
    """Logits of a padded prompt, read in two parts, and of steps after it. Makes no tensor
    itself."""
    parts, at = [], 0
    for end in ENDS:
        given = {
            "attention_mask": MASK[:, :end],
            "position_ids": POSITIONS[:, at:end],
            "past_key_values": cache,
        }
        with torch.no_grad():
            parts.append(model(IDS[:, at:end], **given).logits[:, -1])
        at = end
    return torch.stack(parts)


BATCH = make_batch([150, 117])
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)
ENDS = [100, 147, 148, 149, 150]


@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
def test_caches_keep_nothing_on_the_default_device(offload: str | None) -> None:
    """Of full attention: Transformers' own layers for sliding windows make a number on the default
    device."""

    def cache() -> hip_hf.HiPCache:
        return hip_hf.HiPCache(model.config, offload=offload, device_pages=8 if offload else None)

    model = make_model("llama")
    expected = conversation(model, cache())
    with elsewhere():
        assert torch.equal(conversation(model, cache()), expected)


@pytest.mark.parametrize("patched", [False, True])
def test_reordered_and_cropped_caches_stay_where_they_are(patched: bool) -> None:
    def beams(cache: hip_hf.HiPCache) -> torch.Tensor:
        first = conversation(model, cache)
        cache.reorder_cache(order)
        cache.crop(-30)
        with torch.no_grad():
            again = model(
                IDS[:, 120:121], attention_mask=MASK[:, :121], past_key_values=cache
            ).logits
        return torch.cat([first.flatten(), again.flatten()])

    model, order = make_model("llama"), torch.tensor([1, 1])
    if patched:
        hip_hf.patch(model)
    expected = beams(hip_hf.HiPCache(model.config))
    with elsewhere():
        assert torch.equal(beams(hip_hf.HiPCache(model.config)), expected)


@pytest.mark.parametrize(
    ("family", "how"),
    [("llama", "as it is"), ("llama", "patched"), ("llama", "extended"), ("gpt_oss", "as it is")],
)
def test_layers_whose_weights_wait_on_disk(
    family: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `device_map` offloads what does not fit: outside of a layer's call its weights, attention
    sinks among them, are on `meta`."""
    full = copy.deepcopy(FAMILIES["gpt_oss"])  # full attention in every layer, as above
    full.layer_types = ["full_attention"] * full.num_hidden_layers
    monkeypatch.setitem(FAMILIES, "gpt_oss", full)
    changes = {
        "patched": hip_hf.patch,
        "extended": lambda model: hip_hf.configure(model, extend="streaming"),
    }
    whole = make_model(family)
    whole.save_pretrained(tmp_path)
    room = {"cpu": 97 * sum(weight.nbytes for weight in whole.parameters()) // 100}
    given = dict(
        device_map="auto",
        max_memory=room,
        offload_folder=tmp_path / "offloaded",
        attn_implementation="hip",
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    for each in (whole, model):
        changes.get(how, lambda model: None)(each)
    expected = conversation(whole, hip_hf.HiPCache(whole.config))
    with elsewhere():
        assert torch.equal(conversation(model, hip_hf.HiPCache(model.config)), expected)
    assert paths(model) == ["sparse", "sparse"]
    assert [layer.self_attn.k_proj.weight.device.type for layer in model.model.layers] == [
        "cpu",
        "meta",
    ]


def test_draws_do_not_depend_on_the_default_device() -> None:
    square, cpu = hyper.Square(100, 200, 0, 100), torch.device("cpu")

    def drawn() -> list[torch.Tensor]:
        level = Level.of([square], 0, hyper.Options(), 0, 2, cpu)  # as the kernels want it
        draws = [
            hyper.projections(hyper.Options(), 16, 0, cpu),
            hyper.sampled_ranks(square, 10, 0, cpu),
        ]
        return [
            *draws,
            level.table,
            level.starts,
            level.samples,
            level.row_bounds,
            level.key_bounds,
        ]

    expected = drawn()
    with elsewhere():
        found = drawn()
    assert all(map(torch.equal, found, expected))
