"""Calls through the kernels with tensors that say they are on a GPU and hold nothing: none is on the wrong device, and the host
waits for none. Launches are noted, not made."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from interpreter import DEVICE, interpreter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hip_hf import HiPConfig, hip_attention
from hip_hf.backends.triton import dense, trust
from hip_hf.backends.triton.attention.backward import Part, gradients
from hip_hf.backends.triton.checks import HYPER_SIZES
from hip_hf.backends.triton.common import tuning
from hip_hf.backends.triton.common.arguments import Logits, Reads
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.cache.pages import row_numbers
from hip_hf.geometry import Span
from hip_hf.integration import decode_fast_path, layer_attention
from hip_hf.rope import Positions, Rope
from hip_hf.state import DecodeState

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the same calls run with numbers in them")

GPU = torch.device("cuda", 0)
# Every call is sparse, by kernels.
FIELDS = dict(backend="triton", dense_below=0, dense_layers=0, budget=64, sink=16, window=32, dense_tail=16)


class NothingIsFetched(TorchDispatchMode):
    """Refuses copies from the GPU to the host; that of a number, or a shape that depends on numbers, fake tensors refuse."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            fetched = [x for x in args if isinstance(x, torch.Tensor) and x.device.type == "cuda"]
            assert not fetched, f"{func} copies from the GPU to the host, which waits for it"
        return found


class Operations(TorchDispatchMode):
    """Counts what reaches PyTorch's dispatcher."""

    def __init__(self, into: Counter[str]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.into[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device_guards() -> Iterator[None]:
    """What PyTorch asks to switch the current device: where it is built without CUDA, the CPU's guards, which do nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cpu, cuda = 0, 1  # `c10::DeviceType`
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[cuda]
    guards[cuda] = before or guards[cpu]
    yield
    guards[cuda] = before


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device_guards: None) -> Iterator[list[str]]:
    """The kernels that were launched."""
    noted: list[str] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        where = {name: x.device for name, x in given.items() if isinstance(x, torch.Tensor)}
        assert len(set(where.values())) == 1, f"{kernel.__name__} has tensors on {where}"
        assert GPU.type in str(where), f"{kernel.__name__} has tensors on {where}"
        noted.append(kernel.__name__)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda host: host)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(trust, "_lacking", lambda _: "")
    monkeypatch.setattr(tuning, "_target", lambda _: "sm90")
    monkeypatch.setattr(tuning, "_processors", lambda _: 132)
    with FakeTensorMode(), NothingIsFetched():
        yield noted
    for kept in (dense.sequences_of, row_numbers):  # what is kept from call to call would be of no use to others
        kept.cache_clear()


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
        ({"delta": 16, "delta_mode": "step"}, {"select_kernel", "attend_kernel"}),
        ({"method": "hyper", "options": HYPER_SIZES}, {"attend_kernel", "hash_kernel", "square_kernel"}),
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
        out = hip_attention(*qkv(2000, 9000), config=HiPConfig(**{**FIELDS, "backend": "auto"}), sliding_window=window)
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
    found = gradients(q, k, v, Logits(0.125, sinks=sinks), (part,), q, lse, q, None, need_sinks=True)
    assert all(x.device == GPU for x in found)
    assert set(launches) == {"query_gradient_kernel", "key_gradient_kernel"}


def whole(mask: torch.Tensor, rows: int) -> tuple[Span, ...]:
    """The span of one row without padding."""
    keys = mask.shape[-1]
    return (Span(0, 0, keys, 0, rows, keys - rows),)


def llama() -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
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
        yield from tensors({name: kept for name, kept in vars(x).items() if name != "number"})  # which is the host's own


def test_a_model(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and decode steps of a Llama. What the mask says is the one thing that a forward reads on the host."""
    for module in (decode_fast_path, layer_attention):
        monkeypatch.setattr(module, "mask_spans", whole)
    with torch.device(GPU), torch.no_grad():
        model = LlamaForCausalLM(llama()).eval()
        cache = model(torch.zeros(1, 400, dtype=torch.long)).past_key_values
        assert launches.count("attend_kernel") >= 2
        for _ in range(2):
            launches.clear()
            assert model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache).logits.device == GPU
            assert launches.count("attend_kernel") == 2


def test_a_model_whose_layers_lie_on_two_devices(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `device_map` lays them, by its hooks: what a layer keeps lies where the layer is, and no launch meets both devices."""
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
            assert model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache).logits.device == GPU
            assert launches.count("attend_kernel") == 2
    for layer, device in zip(cache.layers, (GPU, other), strict=True):
        found = list(tensors(layer))
        assert len(found) > 2
        assert {x.device for x in found} == {device}
