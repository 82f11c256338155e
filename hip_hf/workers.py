"""Threads and buffers of the torch backend.

Many small operations per query block lose to OpenMP's fork and join; whole query blocks in
single-threaded workers do not. Fresh large temporaries lose to page faults; buffers that each
worker keeps do not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

# Logits that rows and many keys make at a time, in each worker, to stay in cache: more keys, or
# more rows, wait for these.
LOGITS_AT_ONCE = 1 << 20


class Like(Protocol):
    """A tensor, or keys in pages: what has a dtype and a device."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the elements."""
        ...

    @property
    def device(self) -> torch.device:
        """Return the device on which the elements lie."""
        ...


class Scratch(threading.local):
    """Reusable buffers, one set per thread; `take` hands out uninitialised memory that the next
    `take` of that name reuses."""

    def __init__(self) -> None:
        # the buffer, and what was handed out of it last: most calls ask for the same shape again
        self.buffers: dict[tuple[str, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Like) -> Tensor:
        """Return a buffer of the given `shape`, in dtype and device of `like`."""
        key = (name, like.dtype, like.device)
        buffer, part = self.buffers.get(key, (None, None))
        if part is not None and part.shape == shape:
            return part
        size = prod(shape)
        with torch.inference_mode(False):  # what is made here outlives the mode
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            part = buffer[:size].view(shape)
        self.buffers[key] = buffer, part
        return part


scratch = Scratch()


def widened(x: Tensor) -> Tensor:
    """Return `x` (of any shape) itself in fp32 or fp64; half precision is copied into a buffer in
    fp32, since it is slow to exponentiate and too coarse to sum up."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return scratch.take("wide", tuple(x.shape), x.new_empty(0, dtype=torch.float32)).copy_(x)


def _make_pool(size: int) -> ThreadPoolExecutor:
    """A pool of single-threaded workers, for threads of `torch.get_num_threads()`."""
    executor = ThreadPoolExecutor(size, thread_name_prefix="hip_hf")
    barrier = threading.Barrier(size + 1)

    def settle() -> None:
        # a thread's first operation would set it to the process's number of threads: have that over
        # first
        torch.get_num_threads()
        torch.set_num_threads(1)
        barrier.wait()

    for _ in range(size):
        executor.submit(settle)
    barrier.wait()
    # threads started later would inherit the workers' setting: put it back
    torch.set_num_threads(size)
    return executor


# By size: threads that call with different numbers of threads must not take each other's workers
# away.
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _forget_pools() -> None:
    """In a forked process, whose parent's workers are not there, and whose lock may have been
    held."""
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


def run(task: Callable[[Item], None], items: Iterable[Item], device: torch.device) -> None:
    """`task(item)` for every item: in parallel on a CPU with several threads, one after another
    elsewhere. Where one fails, or the caller is interrupted, no other is running when the error
    arrives."""
    items = list(items)
    size = torch.get_num_threads()
    if device.type != "cpu" or size == 1 or len(items) == 1:
        with torch.no_grad():
            for item in items:
                task(item)
        return

    futures: list[Future[None]] = []
    inference = torch.is_inference_mode_enabled()  # a thread's own, like the gradient mode

    def in_mode(item: Item) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            task(item)

    with _lock:
        pool = _pools.get(size) or _pools.setdefault(size, _make_pool(size))
    try:
        for item in items:
            futures.append(pool.submit(in_mode, item))
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise


def compute_dtype(x: Like) -> torch.dtype:
    """The dtype to multiply in: fp16 and, without matrix instructions for it, bf16 are slow on
    CPUs, so there it is fp32."""
    if x.device.type != "cpu" or x.dtype in (torch.float32, torch.float64):
        return x.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 and _fast_bf16() else torch.float32


def _fast_bf16() -> bool:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
