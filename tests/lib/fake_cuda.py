"""Fake tensors that say they are on a GPU: fixtures note launches, modes watch operations."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import interpreter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hip_hf.backends.triton import dense, trust
from hip_hf.backends.triton.common import tuning
from hip_hf.cache.pages import row_numbers

GPU = torch.device("cuda", 0)


class NothingIsFetched(TorchDispatchMode):
    """Refuses copies from the GPU to the host; that of a number, or a shape that depends on
    numbers, fake tensors refuse."""

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
    """What PyTorch asks to switch the current device: where it is built without CUDA, the CPU's
    guards, which do nothing."""
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
    for kept in (
        dense.sequences_of,
        row_numbers,
    ):  # what is kept from call to call would be of no use to others
        kept.cache_clear()
