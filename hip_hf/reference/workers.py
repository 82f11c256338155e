"""Threads and buffers of the torch backend.

Many small operations per query block lose to OpenMP's fork and join; whole query blocks in single-threaded
workers do not. Fresh large temporaries lose to page faults; buffers that each worker keeps do not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Scratch(threading.local):
    """Reusable buffers, one set per thread; `take` hands out uninitialised memory that the next `take` of that name reuses."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A buffer of `shape`, in dtype and device of `like`."""
        key, size = (name, like.dtype, like.device), prod(shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            self.buffers[key] = buffer
        return buffer[:size].view(shape)


scratch = Scratch()


def widened(x: torch.Tensor) -> torch.Tensor:
    """Itself in fp32 or fp64; half precision as a buffer in fp32, since that is slow to exponentiate and too coarse to sum up."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return scratch.take("wide", tuple(x.shape), x.new_empty(0, dtype=torch.float32)).copy_(x)


class _Pool:
    """A pool of single-threaded workers for one process and one `torch.get_num_threads()`."""

    def __init__(self, size: int) -> None:
        self.size, self.pid = size, os.getpid()
        self.executor = ThreadPoolExecutor(size, thread_name_prefix="hip_hf")
        barrier = threading.Barrier(size + 1)

        def settle() -> None:
            # a thread's first operation would set it to the process's number of threads: have that over before
            torch.get_num_threads()
            torch.set_num_threads(1)
            barrier.wait()

        for _ in range(size):
            self.executor.submit(settle)
        barrier.wait()
        # threads started later would inherit the workers' setting: put it back
        torch.set_num_threads(size)


_pool: _Pool | None = None
_lock = threading.Lock()


def _get_pool(size: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool.size != size or _pool.pid != os.getpid():
            if _pool is not None and _pool.pid == os.getpid():
                _pool.executor.shutdown(wait=False)
            _pool = _Pool(size)
        return _pool.executor


def run(task: Callable[[Item], None], items: Iterable[Item], device: torch.device) -> None:
    """`task(item)` for every item: in parallel on a CPU with several threads, one after another elsewhere."""
    items = list(items)
    size = torch.get_num_threads()
    if device.type != "cpu" or size == 1 or len(items) == 1:
        with torch.no_grad():
            for item in items:
                task(item)
        return

    inference = torch.is_inference_mode_enabled()  # a thread's own, like the gradient mode

    def in_mode(item: Item) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            task(item)

    for future in [_get_pool(size).submit(in_mode, item) for item in items]:
        future.result()


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype to multiply in: fp16 and, without matrix instructions for it, bf16 are slow on CPUs, so there it is fp32."""
    if x.device.type != "cpu" or x.dtype in (torch.float32, torch.float64):
        return x.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 and _fast_bf16() else torch.float32


def _fast_bf16() -> bool:
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)
