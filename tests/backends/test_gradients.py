"""Gradients of the sparse path on the torch backend: those of plain attention to the keys that were
read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DECODE_ROWS, assert_near, eager, make_problem, make_qkv, read_mask, small
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import hip_hf
from hip_hf.attention import attend, hip_attention
from hip_hf.config import HiPConfig

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES: list[dict[str, Any]] = [
    dict(),
    dict(softcap=1.5),
    dict(sliding_window=70),
    dict(sinks=True),
    dict(softcap=2.0, sliding_window=60, sinks=True, scale=0.5),
]


def gradients(
    outputs: list[torch.Tensor], weights: list[torch.Tensor], inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), inputs
        )
    )


@pytest.mark.parametrize("given", FEATURES, ids=lambda given: "+".join(given) or "plain")
@pytest.mark.parametrize(
    ("rows", "starts", "fields"),
    [
        (120, None, dict()),
        (120, [0, 41], dict(dense_tail=23)),
        (75, [5, 100], dict(group_shared=False, block_q=8, block_k=8, rescore=2)),
        (3, [0, 41], dict()),
    ],
    ids=["prompt", "padding and tail", "chunk, per head", "decode"],
)
def test_gradients_are_those_of_attention_to_the_keys_read(
    given: dict, rows: int, starts: Any, fields: dict
) -> None:
    q, k, v = make_qkv(120, rows, batch=2, dv=24, dtype=torch.float64)
    given = (
        dict(given, sinks=torch.randn(4, dtype=torch.float64))
        if given.get("sinks")
        else dict(given)
    )
    inputs = [
        x.requires_grad_() for x in (q, k, v, *([given["sinks"]] if "sinks" in given else []))
    ]
    config = small(**fields)
    result = attend(make_problem(q, k, v, starts, **given), config, need_lse=True, need_mask=True)
    if rows <= DECODE_ROWS and "sliding_window" in given:
        assert result.path == "dense", "decode within a sliding window without a state"
        return
    assert result.path == "sparse"
    plain = {name: x for name, x in given.items() if name != "sliding_window"}
    visible = read_mask(result.mask, config, q, k, starts, sliding=given.get("sliding_window"))
    out, lse = eager(q, k, v, visible, **plain)
    real = visible.any(-1)
    outputs, wanted = [result.out, result.lse[real.expand_as(lse)]], [out, lse[real.expand_as(lse)]]
    weights = [torch.randn_like(x) for x in wanted]
    names = ("q", "k", "v", "sinks")[: len(inputs)]
    for name, a, b in zip(
        names, gradients(outputs, weights, inputs), gradients(wanted, weights, inputs), strict=True
    ):
        assert_near(a, b, 1e-9, f"gradient of {name}")


def test_gradcheck() -> None:
    """Against finite differences, with a selection that they do not change: the keys that match are
    far ahead."""
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    q, k, v = make_qkv(72, heads=1, dim=4, dtype=torch.float64, needles={60: 20, 50: 13})
    config = small(budget=8, window=8)

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return hip_attention(q, k, v, config=config, softcap=3.0, sinks=sinks, return_lse=True)

    assert attend(make_problem(q, k, v), config).path == "sparse"
    assert torch.autograd.gradcheck(
        call, [x.requires_grad_() for x in (q, k, v)] + [sinks], fast_mode=True
    )


@pytest.mark.fast
@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_of_the_tensors_may_ask_for_gradients(which: int) -> None:
    tensors = make_qkv(120)
    tensors[which].requires_grad_()
    assert attend(make_problem(*tensors), small()).path == "sparse"
    hip_attention(*tensors, config=small()).sum().backward()
    assert tensors[which].grad.isfinite().all()
    assert all(x.grad is None for i, x in enumerate(tensors) if i != which)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_as_exact_as_plain_ones(dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(120, dtype=dtype))
    result = attend(make_problem(q, k, v), small(), need_mask=True)
    weight = torch.randn(result.out.shape, dtype=dtype)
    visible = read_mask(result.mask, small(), q, k)
    got = gradients([result.out], [weight], [q, k, v])
    assert [x.dtype for x in got] == [dtype] * 3
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = gradients([eager(*exact, visible)[0]], [weight.double()], exact)
    plain = gradients([eager(q, k, v, visible, dtype=dtype)[0]], [weight], [q, k, v])
    for name, a, b, c in zip("qkv", got, want, plain, strict=True):
        assert_near(a, b, 2 * float((c.double() - b).abs().max()), f"gradient of {name}")


def test_gradients_do_not_meet_what_padding_holds() -> None:
    clean = make_qkv(120, batch=2, dtype=torch.float64)
    spoilt = [x.clone() for x in clean]
    for x in spoilt:
        x[1, :, :40] = torch.nan
    found = []
    for tensors in (clean, spoilt):
        inputs = [x.requires_grad_() for x in tensors]
        result = attend(make_problem(*inputs, [0, 40]), small())
        assert result.path == "sparse"
        found.append(gradients([result.out.square()], [torch.ones_like(result.out)], inputs))
    for name, got, want in zip("qkv", found[1], found[0], strict=True):
        assert_near(got, want, 1e-12, f"gradient of {name}")


def test_nothing_flows_to_keys_that_were_not_read() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(160, 20))
    result = attend(make_problem(q, k, v), small(), need_mask=True)
    result.out.sum().backward()
    read = read_mask(result.mask, small(), q, k).any(2).unflatten(1, (2, 2)).any(2)
    assert not read.all()
    assert ((v.grad != 0).any(-1) == read).all()


@pytest.mark.usefixtures("poison")
def test_gradients_repeat_bit_by_bit(threads: Callable[[int], None]) -> None:
    threads(2)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        inputs = [x.requires_grad_() for x in make_qkv(200, heads=3)]
        out = hip_attention(*inputs, config=small(dense_tail=40))
        found.append(gradients([out], [torch.ones_like(out)], inputs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Training a model.

SPARSE = dict(dense_below=0, dense_layers=0, dense_tail=0, block_q=16, block_k=4, sink=4, window=16)


def make_model(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=256,
    )
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM._from_config(config, attn_implementation="hip").train()
    hip_hf.configure(model, HiPConfig(**settings))
    return model


def losses(model: LlamaForCausalLM, steps: int) -> list[float]:
    """Training on a sequence that repeats itself 60 tokens later, beyond the window."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (2, 60), generator=generator).repeat(1, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_covering_budget_trains_like_dense_attention() -> None:
    dense = losses(make_model(method="dense"), 4)
    sparse = losses(make_model(**SPARSE, budget=256), 4)
    assert dense[-1] < dense[0] - 0.1
    torch.testing.assert_close(torch.tensor(sparse), torch.tensor(dense), atol=1e-4, rtol=0)


def test_sparse_training_learns() -> None:
    model = make_model(**SPARSE, budget=32)
    found = losses(model, 10)
    assert {row.path for row in hip_hf.explain(model)} == {"sparse"}
    assert found[-1] < found[0] - 0.3, found


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """The forward pass runs twice, and must select the same keys twice."""
    found = []
    for checkpointing in (False, True):
        model = make_model(**SPARSE, budget=16)
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        ids = torch.randint(40, (1, 150), generator=torch.Generator().manual_seed(0))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_checkpointed_attention_alone() -> None:
    inputs = [x.requires_grad_() for x in make_qkv(150)]
    config = small()
    plain = hip_attention(*inputs, config=config)
    again = checkpoint(
        lambda q, k, v: hip_attention(q, k, v, config=config), *inputs, use_reentrant=False
    )
    weight = torch.randn_like(plain)
    for a, b in zip(
        gradients([again], [weight], inputs), gradients([plain], [weight], inputs), strict=True
    ):
        assert torch.equal(a, b)
