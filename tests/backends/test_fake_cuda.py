"""Calls through the kernels with tensors that say they are on a GPU and hold nothing: none is on
the wrong device, and the host waits for none. Launches are noted, not made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import fake_cuda
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from fake_cuda import GPU, NothingIsFetched, Operations
from interpreter import DEVICE
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hip_hf import HiPConfig, hip_attention
from hip_hf.backends.triton import trust
from hip_hf.backends.triton.attention.backward import gradients
from hip_hf.backends.triton.checks import HYPER_SIZES
from hip_hf.backends.triton.common.arguments import Logits, Operands, Part, Reads
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.geometry import Span
from hip_hf.integration import decode_fast_path, layer_attention
from hip_hf.rope import Positions, Rope
from hip_hf.state import DecodeState

device_guards, launches = fake_cuda.device_guards, fake_cuda.launches  # fixtures

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="on a GPU the same calls run with numbers in them"
)

# Every call is sparse, by kernels.
FIELDS = dict(
    backend="triton", dense_below=0, dense_layers=0, budget=64, sink=16, window=32, dense_tail=16
)


def qkv(rows: int, keys: int) -> list[torch.Tensor]:
    shapes = (2, 4, rows, 64), (2, 2, keys, 64), (2, 2, keys, 64)
    return [torch.randn(shape, dtype=torch.bfloat16, device=GPU) for shape in shapes]


def test_the_mode_notices() -> None:
    with FakeTensorMode():
        x = torch.zeros(3, device=GPU)
        with pytest.raises(AssertionError, match="copies from the GPU"), NothingIsFetched():
            x.cpu()
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, {"tiles_kernel", "append_kernel", "select_kernel", "attend_kernel"}),
        ({"method": "streaming"}, {"attend_kernel"}),
        ({"delta": 16}, {"select_kernel", "attend_kernel"}),
        (
            {"method": "hyper", "options": HYPER_SIZES},
            {"attend_kernel", "hash_kernel", "square_kernel"},
        ),
    ],
    ids=["hip", "streaming", "step", "hyper"],
)
def test_a_prompt(launches: list[str], fields: dict[str, Any], said: set[str]) -> None:
    out = hip_attention(*qkv(500, 500), config=HiPConfig(**{**FIELDS, **fields}))
    assert out.device == GPU
    assert said <= set(launches)


@pytest.mark.parametrize("extended", [False, True])
def test_a_prompt_and_steps_on_a_state(launches: list[str], extended: bool) -> None:
    state, config = DecodeState(), HiPConfig(**FIELDS, extend="streaming" if extended else None)
    where = Positions(Rope(torch.ones(32), 1.0), 300) if extended else None
    q, k, v = qkv(500, 500)
    hip_attention(q, k, v, config=config, state=state, positions=where)
    launches.clear()
    for step in range(2):
        q, k, v = qkv(1, 501 + step)
        assert hip_attention(q, k, v, config=config, state=state, positions=where).device == GPU
        assert {"append_kernel", "select_kernel", "attend_kernel"} <= set(launches)


@pytest.mark.parametrize("window", [None, 1000], ids=["chunk", "sliding window"])
def test_where_kernels_are_not_trusted_dense_attention_takes_few_operators(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Not a thousand and more: block by block and head by head is for the CPU."""
    monkeypatch.setattr(trust, "_lacking", lambda _: "there is no C compiler")
    monkeypatch.setattr(trust, "_warned", set())
    counted = Counter[str]()
    with pytest.warns(UserWarning, match="no C compiler"), Operations(counted):
        out = hip_attention(
            *qkv(2000, 9000),
            config=HiPConfig(**{**FIELDS, "backend": "auto"}),
            sliding_window=window,
        )
    assert out.device == GPU
    assert not launches
    assert counted.total() < 300


def test_gradients(launches: list[str]) -> None:
    """Without autograd's engine, which asks the device for its streams."""
    q, k, v = qkv(300, 300)
    sequences = Sequences.of([Span(b, 0, 300, 0, 300, 0) for b in range(2)], GPU)
    numbers = torch.zeros(2, 2, 19, 4, dtype=torch.int32, device=GPU)
    part = Part(sequences, Reads(16, 16, 16, 32, numbers, numbers[..., 0].contiguous()))
    lse, sinks = torch.zeros(q.shape[:3], device=GPU), torch.zeros(4, device=GPU)
    x = Operands(q, KeyValues(k, v), Logits(0.125, sinks=sinks), q, lse)
    found = gradients(x, (part,), q, None)
    assert all(x.device == GPU for x in found)
    assert set(launches) == {"query_gradient_kernel", "key_gradient_kernel"}


def whole(mask: torch.Tensor, rows: int) -> tuple[Span, ...]:
    """The span of one row without padding."""
    keys = mask.shape[-1]
    return (Span(0, 0, keys, 0, rows, keys - rows),)


def llama() -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.hip = FIELDS
    config._attn_implementation = "hip"
    return config


def tensors(x: Any) -> Iterator[torch.Tensor]:
    """All that an object, and what it holds, keeps."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors(part)
    elif type(x).__module__.startswith("hip_hf") and hasattr(x, "__dict__"):
        yield from tensors(
            {name: kept for name, kept in vars(x).items() if name != "number"}
        )  # which is the host's own


def test_a_model(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and decode steps of a Llama. What the mask says is the one thing that a forward reads
    on the host."""
    for module in (decode_fast_path, layer_attention):
        monkeypatch.setattr(module, "mask_spans", whole)
    with torch.device(GPU), torch.no_grad():
        model = LlamaForCausalLM(llama()).eval()
        cache = model(torch.zeros(1, 400, dtype=torch.long)).past_key_values
        assert launches.count("attend_kernel") >= 2
        for _ in range(2):
            launches.clear()
            assert (
                model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache).logits.device
                == GPU
            )
            assert launches.count("attend_kernel") == 2


def test_a_model_whose_layers_lie_on_two_devices(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `device_map` lays them, by its hooks: what a layer keeps lies where the layer is, and no
    launch meets both devices."""
    for module in (decode_fast_path, layer_attention):
        monkeypatch.setattr(module, "mask_spans", whole)
    other, config = torch.device("cuda", 1), llama()
    with torch.device(GPU), torch.no_grad():
        model = LlamaForCausalLM(config).eval()
        with torch.device(other):
            model.model.layers[1] = LlamaDecoderLayer(config, 1).eval()
        for module, device in ((model.model.layers[1], other), (model.model.norm, GPU)):
            add_hook_to_module(module, AlignDevicesHook(execution_device=device))
        cache = model(torch.zeros(1, 400, dtype=torch.long)).past_key_values
        for _ in range(2):
            launches.clear()
            assert (
                model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache).logits.device
                == GPU
            )
            assert launches.count("attend_kernel") == 2
    for layer, device in zip(cache.layers, (GPU, other), strict=True):
        found = list(tensors(layer))
        assert len(found) > 2
        assert {x.device for x in found} == {device}
