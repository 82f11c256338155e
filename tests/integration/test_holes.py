"""Padding between a few first keys and the rest of a row, as prompt and prefix tuning make it:
sparse, and right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from helpers import assert_near, eager
from transformers.masking_utils import causal_mask_function

import hip_hf
from hip_hf.integration.attention_function import attention_forward
from hip_hf.integration.masks import hip_mask

VIRTUAL, KEYS = 9, 180


def adapted(kind: str, implementation: str, **settings: Any) -> Any:
    """A tuned Llama: the same weights at every call."""
    peft = pytest.importorskip("peft", reason="pip install '.[test]'")
    model = make_model("llama", implementation, **settings)
    torch.manual_seed(1)
    config = getattr(peft, f"{kind}TuningConfig")(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    tuned = peft.get_peft_model(model, config).eval()
    for name, parameter in tuned.named_parameters():
        if "prompt" in name:
            parameter.data.normal_()
    return tuned


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits of the prompts, and of each new token."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        logits = model(**batch).logits[:, -batch["input_ids"].shape[1] :]
    out = model.generate(
        **batch, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return [logits[batch["attention_mask"].bool()], torch.stack(out.logits)]


@pytest.mark.parametrize("kind", ["Prompt", "Prefix"])
def test_tuned_prompts_with_left_padding(kind: str) -> None:
    batch, model = make_batch([KEYS, 111, 30]), adapted(kind, "hip", budget=512)
    got = outputs(model, batch)
    assert paths(model) == ["sparse"] * 2
    torch.testing.assert_close(got, outputs(adapted(kind, "eager"), batch), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(
        got[0], outputs(make_model("llama", budget=512), batch)[0], atol=1e-2
    ), "the tuning does nothing"


@pytest.mark.parametrize("kind", ["Prompt", "Prefix"])
def test_a_budget_prunes_tuned_prompts(kind: str) -> None:
    batch, model = make_batch([KEYS, 111]), adapted(kind, "hip")
    outputs(model, batch)
    rows = hip_hf.explain(model)
    assert [row.path for row in rows] == ["sparse"] * 2
    assert all(0.2 < row.share < 0.7 for row in rows if row.share is not None)


@pytest.mark.parametrize("kind", ["Prompt", "Prefix"])
def test_the_tuned_tokens_learn(kind: str) -> None:
    batch, found = make_batch([KEYS, 111]), []
    for implementation in ("hip", "eager"):
        model = adapted(kind, implementation, budget=512)
        model(**batch).logits[:, -100:].square().mean().backward()
        found.append(next(p.grad for name, p in model.named_parameters() if "prompt" in name))
    assert found[0].any()
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": dict(softcap=2.0),
    "sinks": dict(s_aux=torch.linspace(-2, 2, 4)),
}


# which keys are padding, how many are read, and the path
HOLES: dict[str, tuple[list[tuple[int, int]], int, str]] = {
    "few keys before": ([(5, 11), (20, 47)], 512, "sparse"),
    "more than is read": ([(40, 47)], 8, "dense"),
}


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("rows", [KEYS, 40, 1])
@pytest.mark.parametrize("name", FEATURES)
def test_what_each_row_sees(name: str, rows: int, window: int | None, holes: str) -> None:
    """Of a batch whose second row has no hole. With a sliding window it is dense."""
    where, budget, path = HOLES[holes]
    real = torch.ones(2, KEYS, dtype=torch.bool)
    for start, end in where:
        real[0, start:end] = False
    real[1, :30] = False
    seen = torch.ones(KEYS, KEYS, dtype=torch.bool).tril().triu(1 - (window or KEYS))
    seen = (seen & real[:, None])[:, None, -rows:]
    q, k, v = torch.randn(2, 4, rows, 16), torch.randn(2, 2, KEYS, 16), torch.randn(2, 2, KEYS, 16)
    fields = FEATURES[name]
    want, _ = eager(q, k, v, seen, softcap=fields.get("softcap"), sinks=fields.get("s_aux"))
    mask = hip_mask(2, rows, KEYS, KEYS - rows, 0, causal_mask_function, real, local_size=window)
    module = make_model("llama", budget=budget, sink=0, window=0).model.layers[0].self_attn
    got = attention_forward(module, q, k, v, mask, **fields)[0]
    assert_near(got[real[:, -rows:]], want.transpose(1, 2)[real[:, -rows:]])
    assert module._hip_call.path == (path if window is None else "dense")
