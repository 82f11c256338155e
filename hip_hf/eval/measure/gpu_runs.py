"""What `gpu_latency` times and how: the device's clock, CUDA graphs, and decode steps that such a
graph can hold.

Without a GPU everything runs the same on a CPU, by its clock and without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hip_hf.attention import Result
from hip_hf.backends.triton.common.arguments import Logits, Operands
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.backends.triton.selection.search import SelectionBuffers, select
from hip_hf.backends.triton.sparse import DeviceState, decode_step
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.latency import TimedRun, wall
from hip_hf.geometry import Span
from hip_hf.problem import AttentionProblem

# Larger than any second-level cache.
FLUSHED = 2**28

Work = Callable[[], Any]


class DeviceClock:
    """Seconds and result of a run on `device`. `peak`: GB that the last run took beyond what was
    there before it, its result included; None without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(FLUSHED if self.cuda else 0, dtype=torch.int8, device=device)
        self.peak: float | None = None

    def __call__(self, run: Work) -> tuple[float, Any]:
        if not self.cuda:
            return wall(run)
        self.flushed.zero_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        # the host's count, which waits for nothing
        self.peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        end.synchronize()
        return start.elapsed_time(end) / 1000, result


class Timed(TimedRun):
    """`said`: path, and reason for a dense one. `peak`: GB that the call takes. No result is
    kept."""

    clock: DeviceClock
    said: tuple[str, str] = ("sparse", "")
    peak: float | None = None

    def once(self) -> float:
        """Run once and return the seconds. What the result says and its memory are noted, and it is
        freed."""
        seconds = super().once()
        if isinstance(self.result, Result):
            self.said = self.result.path, self.result.reason
        self.result = None
        self.peak = self.clock.peak
        return seconds


def captured(run: Work, device: torch.device) -> Work:
    """`run` as a CUDA graph where there is a GPU; it must have compiled everything when it ran
    before."""
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class CapturedSteps:
    """`count` decode steps of each row of a batch on a cache of `length` keys, from where the
    prompt left it, at each call again: nothing here depends on what the device has done before, so
    a CUDA graph can hold it.

    `tensors`: q `[B, Hq, count, D]`; k, v `[B, Hkv, length + count, D]`. `attend` False: summaries
    and selection only. `state`: that of other steps on the same keys, which then are not summarised
    once more.
    """

    def __init__(
        self,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        length: int,
        count: int,
        config: HiPConfig,
        attend: bool = True,
        state: DeviceState | None = None,
    ) -> None:
        q, k, v = tensors
        self.q, self.kv, self.logits = q, KeyValues(k, v), Logits(q.shape[3] ** -0.5)
        self.length, self.count, self.config, self.attend = length, count, config, attend
        capacity, batch = k.shape[2], range(q.shape[0])
        if state is None:
            spans = tuple(Span(b, 0, capacity, 0, 1, capacity - 1) for b in batch)
            problem = AttentionProblem(q[:, :, :1], k, v, spans, self.logits.scale)
            state = DeviceState.make(config, problem, capacity)
            if state.pyramid is not None:
                prompt = Sequences.of([Span(b, 0, length, 0, length, 0) for b in batch], q.device)
                state.pyramid.extend(self.kv, prompt, config.block_q, append=False)
        self.state = state
        self.sequences = Sequences.of([Span(b, 0, capacity, 0, 1, length) for b in batch], q.device)
        self.out = torch.empty(*q.shape[:2], 1, v.shape[3], dtype=q.dtype, device=q.device)

    def __call__(self) -> torch.Tensor:
        position, state, pyramid = self.sequences.table[4], self.state, self.state.pyramid
        position.fill_(self.length)
        assert state.selection.made is not None
        state.selection.made.fill_(SelectionBuffers.NEVER)
        if pyramid is not None:
            pyramid.truncate(self.length // self.config.block_k)
        for step in range(self.count):
            row = self.q[:, :, step : step + 1]
            if self.attend:
                x = Operands(row, self.kv, self.logits, self.out)
                decode_step(x, self.sequences, self.config, state)
            else:
                assert pyramid is not None
                pyramid.extend(self.kv, self.sequences, 1, append=True)
                call = self.kv, self.sequences, self.config, self.logits
                select(row, pyramid.table, *call, 1, state.selection)
            position.add_(1)
        return self.out
