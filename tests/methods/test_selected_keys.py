"""A budget counts where the method spends it, and nowhere else: `streaming` without `recent` and
`dense` select nothing."""

from __future__ import annotations

import pytest
import torch
from extended_models import SMALL, TRAINED, build
from families import make_batch, make_model
from helpers import make_qkv
from transformers import LlamaConfig

import hip_hf
from hip_hf import HiPCache, HiPConfig, explain, hip_attention
from hip_hf.registry import METHODS

HUGE = 64 * TRAINED


@pytest.mark.parametrize("method", METHODS)
def test_selected_keys_are_those_of_the_mask(method: str) -> None:
    config = HiPConfig(
        method=method,
        budget=32,
        block_q=16,
        block_k=8,
        sink=8,
        window=16,
        dense_below=0,
        dense_tail=0,
    )
    _, mask = hip_attention(*make_qkv(200), config=config, return_mask=True)
    if mask is not None:
        assert int(mask.counts.max()) * config.block_k == config.selected_keys


def test_extension_needs_no_room_for_a_budget_that_is_not_spent() -> None:
    """Nor does the budget change an answer, beyond the trained length too."""
    batch = make_batch([2 * TRAINED])
    found = []
    for budget in (32, HUGE):
        model = build(LlamaConfig(**SMALL), extend="streaming", method="streaming", budget=budget)
        with torch.no_grad():
            found.append(model(**batch).logits)
        assert all(row.path == "sparse" and row.share < 0.5 for row in explain(model))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=rf"^sink \+ budget \+ window: got {HUGE + 24} keys"):
        hip_hf.configure(model, options={"recent": True})
    with pytest.raises(ValueError, match=r"^sink \+ window: got"):
        hip_hf.configure(model, window=HUGE)
    # dense rows keep true distances, so sink and window are no more to them than a budget is
    hip_hf.configure(model, method="dense", window=HUGE)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_a_budget_that_is_not_spent_covers_nothing() -> None:
    model = make_model("llama", method="streaming", budget=HUGE, dense_below=64)
    with torch.no_grad():
        model(**make_batch([200]))
    assert all(row.path == "sparse" and row.share < 0.5 for row in explain(model))


def test_device_pools_need_no_room_for_it() -> None:
    model = make_model("llama", method="streaming", budget=HUGE)
    with torch.no_grad():
        model(
            **make_batch([200]),
            past_key_values=HiPCache(model.config, offload="cpu", device_pages=2),
        )
        hip_hf.configure(model, options={"recent": True})
        with pytest.raises(ValueError, match="device_pages: got 2, allowed: at least 4"):
            model(
                **make_batch([200]),
                past_key_values=HiPCache(model.config, offload="cpu", device_pages=2),
            )
