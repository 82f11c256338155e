"""What follows tensors through a call (torch.export, torch.func, torch.jit.trace) gets dense
attention, or one sentence."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from families import make_batch, make_model
from helpers import assert_near, causal, eager, make_qkv, small
from torch.func import functional_call, grad, jvp, vmap

import hip_hf
from hip_hf import HiPConfig, hip_attention
from hip_hf.integration.layer_attention import attend_layer
from hip_hf.problem import exporting

FAMILIES = ["llama", "gemma2", "gpt_oss"]
TOKENS = 150  # of which the settings would read half


def dense(family: str) -> Any:
    return make_model(family, method="dense")


@pytest.mark.parametrize(("padded", "strict"), [(True, False), (False, True)])
def test_an_exported_model(padded: bool, strict: bool) -> None:
    """For prompts of any length, where its own length is not in the graph."""
    batch = (
        make_batch([TOKENS, 90])
        if padded
        else {"input_ids": make_batch([TOKENS, TOKENS])["input_ids"]}
    )
    shapes = {name: {1: torch.export.Dim("tokens", min=2, max=4000)} for name in batch}
    program = torch.export.export(
        make_model("llama"),
        (),
        {**batch, "use_cache": False},
        strict=strict,
        dynamic_shapes={**shapes, "use_cache": None},
    )
    for given in (batch, {name: x[:, -100:] for name, x in batch.items()}):
        with torch.no_grad():
            got, want = (
                model(**given, use_cache=False).logits
                for model in (program.module(), dense("llama"))
            )
        real = given["attention_mask"].bool() if padded else ...
        torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss"])
def test_an_exported_model_with_a_window_and_sinks(family: str) -> None:
    batch = {**make_batch([TOKENS, 90]), "use_cache": False}
    program = torch.export.export(make_model(family), (), batch, strict=False)
    with torch.no_grad():
        got, want = (
            model(**batch).logits[batch["attention_mask"].bool()]
            for model in (program.module(), dense(family))
        )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_functional_gradients(family: str) -> None:
    """Also one for each sample."""
    ids, model = make_batch([TOKENS, TOKENS])["input_ids"], make_model(family)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return functional_call(model, weights, (ids,), {"use_cache": False}).logits.square().mean()

    with (
        pytest.warns(UserWarning, match="computed densely: torch.func follows")
        if family == "llama"
        else _nothing()
    ):
        found = grad(loss)(weights, ids)
    assert {row.reason for row in hip_hf.explain(model)} == {
        "torch.func follows the tensors, and could not follow a selection"
    }
    other = dense(family)
    other(ids, use_cache=False).logits.square().mean().backward()
    for name, parameter in other.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-3, rtol=1e-3)
    each = vmap(grad(loss), in_dims=(None, 0))(weights, ids[:, None])
    name = "model.layers.0.self_attn.k_proj.weight"
    torch.testing.assert_close(each[name].mean(0), found[name], atol=1e-3, rtol=1e-3)


def _nothing() -> Any:
    return contextlib.nullcontext()


CALLS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "window": dict(sliding_window=30),
    "softcap": dict(softcap=3.0),
    "sinks": dict(sinks=torch.linspace(-2, 2, 4)),
    "padding": dict(key_start=torch.tensor([3, 0]), q_start=torch.tensor([5, 7])),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("rows", [1, 60])
def test_the_operation_itself(rows: int, name: str) -> None:
    q, k, v = make_qkv(100, rows, batch=2)
    config, fields = HiPConfig(budget=16, block_k=4, sink=4, window=16, dense_below=0), CALLS[name]
    starts = {key: fields[key].tolist() for key in ("key_start", "q_start") if key in fields}
    more = {key: fields[key] for key in ("softcap", "sinks") if key in fields}
    want, want_lse = eager(
        q, k, v, causal(2, rows, 100, **starts, sliding=fields.get("sliding_window")), **more
    )

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return hip_attention(q, k, v, config=config, return_lse=True, return_mask=True, **fields)

    if name != "padding":  # whose numbers are one for each row of the whole batch
        got, lse, mask = vmap(lambda *x: call(*(t[None] for t in x)), out_dims=(0, 0, None))(
            q, k, v
        )
        assert_near(got[:, 0], want)
        assert_near(lse[:, 0], want_lse)
        assert mask is None
    slopes = grad(lambda q: call(q, k, v)[0].sum())(q)
    leaf = q.double().requires_grad_()
    eager(leaf, k, v, causal(2, rows, 100, **starts, sliding=fields.get("sliding_window")), **more)[
        0
    ].sum().backward()
    assert_near(slopes, leaf.grad)
    got, _ = jvp(lambda q: call(q, k, v)[0], (q,), (torch.ones_like(q),))
    assert_near(got, want)


def test_a_trace_follows_no_selection() -> None:
    """It would be that of the traced numbers, whatever comes later."""
    config = HiPConfig(budget=16, block_k=4, sink=4, window=16, dense_below=0)

    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return hip_attention(q, k, v, config=config)

    traced = torch.jit.trace(Attention(), make_qkv(100), check_trace=False)
    q, k, v = make_qkv(100)
    assert_near(traced(q, k, v), eager(q, k, v, causal(1, 100, 100))[0])


def test_extension_is_refused() -> None:
    model, ids = make_model("llama", extend="streaming"), make_batch([60])["input_ids"]
    weights = dict(model.named_parameters())
    said = r"^extend: got 'streaming' under torch\.func, which gets dense attention, allowed: None"
    with pytest.raises(ValueError, match=said):
        grad(lambda w: functional_call(model, w, (ids,), {"use_cache": False}).logits.sum())(
            weights
        )


class Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return hip_attention(q, k, v, config=small())


def test_a_layer_without_a_mask_keeps_its_sliding_window() -> None:
    """Also where what follows the tensors makes it dense."""
    layer = make_model("llama").model.layers[0].self_attn
    q, k, v = make_qkv(100)

    def attend(q: torch.Tensor) -> torch.Tensor:
        return attend_layer(layer, q, k, v, None, sliding_window=24)[0].transpose(1, 2)

    class Windowed(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return attend(q)

    want, _ = eager(q, k, v, causal(1, 100, 100, sliding=24))
    with warnings.catch_warnings():  # each cause is told once a process
        warnings.simplefilter("ignore")
        assert_near(torch.func.vjp(attend, q)[0], want)
    assert_near(torch.export.export(Windowed(), (q,), strict=False).module()(q), want)


def test_an_exported_operation() -> None:
    program = torch.export.export(Attention(), make_qkv(100), strict=False)
    given = make_qkv(100)
    want, _ = eager(*given, causal(1, 100, 100))
    assert_near(program.module()(*given), want)
    assert not torch.allclose(
        Attention()(*given).double(), want, atol=1e-3
    )  # outside of the graph the selection is followed


def test_an_export_is_found_out_where_pytorch_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with PyTorch 2.6, which has no flag for it."""
    monkeypatch.delattr(torch.compiler, "_is_exporting_flag", raising=False)
    assert not exporting()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert exporting()
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert not exporting()  # torch.compile


def test_a_compiled_call_is_no_export() -> None:
    """Whatever PyTorch says there: with 2.11 a compiled graph was dense attention, whatever the
    settings."""
    assert (
        torch.compile(lambda x: x + exporting(), fullgraph=True, backend="eager")(torch.zeros(1))
        == 0
    )
