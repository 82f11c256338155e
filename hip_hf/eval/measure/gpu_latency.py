"""`hip-hf latency --device cuda`: one attention call on a GPU against PyTorch's FlashAttention and
cuDNN, the faster of the two.

Prefill is one causal call over the whole context, `selection` what finds its key blocks, `backward`
the gradients of q, k and v. Decode steps run from CUDA graphs on both sides, since a step is
shorter than what launching it takes: a graph holds as many steps as make whole selections and key
blocks, which share selections as in generation (*amortised*) or not (*refreshed*). *Launched* are
as many steps without a graph, those of `hip` through all that a model's layer calls: what the host
takes is in them. Times are those of the device's own events, its second-level cache emptied before
each run. Without a GPU everything runs the same on a CPU, by its clock and without graphs (the
kernels by Triton's interpreter): to be tested, not to be believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hip_hf.attention import dense_reason
from hip_hf.backends.triton import ops
from hip_hf.backends.triton.common.tuning import processors, target_of
from hip_hf.backends.triton.sparse import DeviceState
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import kernel_costs as costs
from hip_hf.eval.measure import latency
from hip_hf.eval.measure.gpu_runs import CapturedSteps, DeviceClock, Timed, Work, captured
from hip_hf.eval.measure.gpu_shapes import KernelCost, Shape, gpu_of
from hip_hf.eval.measure.latency import GrowingSteps, baseline, interleave, ours, refresh_period
from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.resumable import Resumable, Rows
from hip_hf.problem import AttentionProblem, make_spans

GPU_LENGTHS = [8192 * 2**i for i in range(8)]  # 8K to 1M
TIMED_METHODS = ("hip", "streaming", "hyper", "dense")  # hyper decodes densely
BACKWARD, SELECTION, DECODE_SELECTION = "backward", "selection", "decode selection"
# Of a decode step without a graph, after the name of its phase.
LAUNCHED = ", launched"
BASELINES = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# What the model in docs/performance.md takes each phase for; all others are decode steps.
KERNELS = {
    latency.PREFILL: costs.prompt_kernels,
    SELECTION: costs.selection_kernels,
    DECODE_SELECTION: costs.refresh_kernels,
    BACKWARD: costs.gradient_kernels,
}
DENSE_COSTS = {latency.PREFILL: costs.dense_prefill, BACKWARD: costs.dense_gradients}
# What can be asked for, by the method of `Bench` that measures it.
KINDS = {
    "prefill": {"prefill", SELECTION},
    "decode": {"decode"},
    "launched": {"launched"},
    "backward": {"backward"},
}
# Enough of a call to know whether a backend takes it.
BASELINE_PROBE = 256


def within(backend: SDPBackend, run: Work) -> Any:
    """What `run` returns where PyTorch attends by this backend."""
    with sdpa_kernel(backend):
        return run()


@dataclass
class MeasuredRuns:
    """Runs of one phase and length: `ours` by settings, `dense` by backend; a run is `steps` steps
    of `tokens` tokens each."""

    phase: str
    length: int
    ours: dict[str, Timed]
    dense: dict[str, Timed]
    steps: dict[str, int]
    dense_steps: int = 1
    tokens: int = 1


@dataclass
class Bench:
    """What is the same for all lengths. `backends`: which of PyTorch's are baselines."""

    plan: latency.TimingPlan
    dtype: str
    clock: DeviceClock
    backends: Sequence[str] = tuple(BASELINES)
    refused: dict[str, None] = field(default_factory=dict)  # what PyTorch's backends said, in order

    @property
    def shape(self) -> Shape:
        """Return the attention layer that is timed, as the cost model describes it."""
        plan, like = self.plan, torch.empty(0, device=self.plan.device)
        heads = plan.heads, plan.kv_heads, plan.head_dim
        size = latency.TIMED_DTYPES[self.dtype].itemsize
        return Shape(*heads, size, target_of(like), processors(like), plan.batch)

    def call(self, run: Work) -> Timed:
        return Timed(run, self.clock)

    def baselines(self, what: str, probe: Work, run: Work) -> dict[str, Work]:
        """The run by each of PyTorch's backends that takes the `probe`, a small call of its
        kind."""
        runs: dict[str, Work] = {}
        for name in self.backends:
            try:
                within(BASELINES[name], probe)
            except RuntimeError as error:
                self.refuse(what, name, error)
            else:
                runs[name] = partial(within, BASELINES[name], run)
        return runs

    def refuse(self, what: str, name: str, error: Exception) -> None:
        """Note that the backend `name` refuses `what`, with the first line of its error."""
        self.refused[f"{what}, {self.dtype}: {name}: {str(error).strip().splitlines()[0]}"] = None

    def cost(self, phase: str, length: int, config: HiPConfig, path: str) -> KernelCost | None:
        """FLOPs and bytes of a step by the model in docs/performance.md, which knows `hip` and
        dense attention."""
        call = length, config, self.shape
        if path == "dense":
            one = DENSE_COSTS.get(phase, costs.dense_decode)(length, self.shape)
        elif config.method != "hip":
            return None
        elif phase in KERNELS:
            one = costs.call_total(KERNELS[phase](*call))
        else:
            one = costs.call_total(costs.step_kernels(*call, refresh_period(config)))
        return one.times(self.plan.batch)

    def rows(
        self, measured: MeasuredRuns, configs: dict[str, HiPConfig], selections: dict[str, float]
    ) -> Rows:
        """Rows of the report. `selections`: seconds of a step that go to selection."""
        times = {name: median(call.seconds) for name, call in measured.dense.items()}
        best = min(times, key=times.__getitem__, default=None)
        dense = None if best is None else times[best] / measured.dense_steps
        device = torch.cuda.get_device_name(self.plan.device) if self.clock.cuda else "CPU"
        gpu, found = gpu_of(device), []
        for name, call in measured.ours.items():
            path, reason = call.said
            seconds = median(call.seconds) / measured.steps[name]
            cost = self.cost(measured.phase, measured.length, configs[name], path)
            least = cost.milliseconds(gpu) if cost and gpu else None
            selecting = None if path == "dense" else selections.get(name)
            found.append(
                {
                    "phase": measured.phase,
                    "dtype": self.dtype,
                    "batch": self.plan.batch,
                    "length": measured.length,
                    "settings": name,
                    "hip_ms": 1000 * seconds,
                    "sdpa_ms": None if dense is None else 1000 * dense,
                    "sdpa": best or "-",
                    "times_faster": None if dense is None else dense / seconds,
                    "tokens_per_s": self.plan.batch * measured.tokens / seconds,
                    "tflops": None if cost is None else cost.flops / seconds / 1e12,
                    "gb_per_s": None if cost is None else cost.bytes / seconds / 1e9,
                    "over_floor": None if least is None else 1000 * seconds / least,
                    "selecting": None if selecting is None else selecting / seconds,
                    "peak_gb": call.peak,
                    "sdpa_peak_gb": measured.dense[best].peak if best else None,
                    "path": path,
                    "reason": reason,
                    "runs": len(call.seconds),
                }
            )
        return found

    def time(self, what: str, dense: dict[str, Timed], calls: Sequence[Timed]) -> None:
        """All interleaved; a baseline that takes the probe and not the call drops out."""
        for name, call in list(dense.items()):
            try:
                call.first(self.plan.repeats, self.plan.enough)
            except RuntimeError as error:
                self.refuse(what, name, error)
                del dense[name]
        interleave([*dense.values(), *calls], self.plan.repeats, self.plan.enough)

    def prefill(self, length: int, phases: Sequence[str]) -> Rows:
        """Rows of prefill and of its selection."""
        plan = self.plan
        q, k, v = plan.random(self.dtype, length, length)
        problem = AttentionProblem(q, k, v, make_spans(q, k), plan.head_dim**-0.5)
        table, _ = ops.make_table(q, k, None, None, 0)
        calls, dense, searches = {}, {}, {}
        for name, config in plan.settings.items():
            if config.method == "hip" and not dense_reason(problem, config, None, False)[0]:
                options = config.text, problem.scale, None, None, config.block_q
                searches[name] = self.call(partial(ops.select, q, k, None, table, *options))
            if "prefill" in phases:
                calls[name] = self.call(partial(ours, q, k, v, config))
        if "prefill" in phases:
            probe = partial(baseline, *(x[:, :, :BASELINE_PROBE] for x in (q, k, v)))
            runs = self.baselines(latency.PREFILL, probe, partial(baseline, q, k, v))
            dense = {name: self.call(run) for name, run in runs.items()}
        self.time(latency.PREFILL, dense, [*calls.values(), *searches.values()])
        once = dict.fromkeys(plan.settings, 1)
        taken = {name: median(call.seconds) for name, call in searches.items()}
        measured = MeasuredRuns(latency.PREFILL, length, calls, dense, once, tokens=length)
        rows = self.rows(measured, plan.settings, taken)
        if SELECTION in phases:
            measured = MeasuredRuns(SELECTION, length, searches, {}, once, tokens=length)
            rows += self.rows(measured, plan.settings, taken)
        return rows

    def backward(self, length: int) -> Rows:
        """Rows of the gradients alone; the forward pass before them is not timed."""
        plan = self.plan
        leaves = plan.random(self.dtype, length, length)
        grad, pull = torch.ones_like(leaves[0]), partial(torch.autograd.grad, retain_graph=True)
        for leaf in leaves:
            leaf.requires_grad_()
        small = [x.detach()[:, :, :BASELINE_PROBE].requires_grad_() for x in leaves]
        with torch.enable_grad():
            runs = self.baselines(
                BACKWARD,
                lambda: pull(baseline(*small), small, torch.ones_like(small[0])),
                lambda: partial(pull, baseline(*leaves), leaves, grad),
            )
            dense = {name: self.call(make()) for name, make in runs.items()}
            calls = {}
            for name, config in plan.settings.items():
                result = ours(*leaves, config)
                calls[name] = self.call(partial(pull, result.out, leaves, grad))
                calls[name].said = result.path, result.reason
        self.time(BACKWARD, dense, list(calls.values()))
        once = dict.fromkeys(plan.settings, 1)
        measured = MeasuredRuns(BACKWARD, length, calls, dense, once, tokens=length)
        return self.rows(measured, plan.settings, {})

    def decode(self, length: int) -> Rows:
        """Rows of decode steps, amortised and refreshed, and of a step's selection."""
        plan = self.plan
        variants, counts = plan.variants()
        most = max(counts.values())
        q, k, v = tensors = plan.random(self.dtype, length + most, most)

        def dense_steps() -> None:
            for step in range(most):
                end = length + step + 1
                baseline(q[:, :, step : step + 1], k[:, :, :end], v[:, :, :end])

        probe = partial(baseline, q[:, :, :1], *(x[:, :, :BASELINE_PROBE] for x in (k, v)))
        runs = self.baselines("decode", probe, dense_steps)
        dense = {name: self.call(captured(run, plan.device)) for name, run in runs.items()}
        calls, alone, states = {}, {}, dict[str, DeviceState]()
        first = q[:, :, :1], k[:, :, :length], v[:, :, :length]
        problem = AttentionProblem(*first, make_spans(*first[:2]), plan.head_dim**-0.5)
        for key, config in variants.items():
            name, steps = key[1], (tensors, length, counts[key], config)
            reason, _ = dense_reason(problem, config, None, False)
            if reason:
                calls[key] = self.call(captured(dense_steps, plan.device))
                calls[key].said = ("dense", reason)
                continue
            own = CapturedSteps(*steps, state=states.get(name))
            states[name] = own.state  # the keys are summarised once
            calls[key] = self.call(captured(own, plan.device))
            if key[0] == latency.REFRESHED and config.method == "hip":
                select_only = CapturedSteps(*steps, attend=False, state=own.state)
                alone[name] = self.call(captured(select_only, plan.device))
        self.time("decode", dense, [*calls.values(), *alone.values()])
        steps_of = {name: counts[latency.REFRESHED, name] for name in alone}
        seconds = {name: median(call.seconds) / steps_of[name] for name, call in alone.items()}
        rows = self.decode_rows(length, "", calls, dense, seconds)
        measured = MeasuredRuns(DECODE_SELECTION, length, alone, {}, steps_of)
        return rows + self.rows(measured, plan.settings, seconds)

    def launched(self, length: int) -> Rows:
        """Rows of decode steps without graphs, on a cache that grows from run to run."""
        plan = self.plan
        variants, counts = plan.variants()
        most, dense, calls = max(counts.values()), {}, {}
        tensors = plan.random(self.dtype, length + most * (plan.repeats + 1), most)
        q, *kv = tensors
        probe = partial(baseline, q[:, :, :1], *(x[:, :, :BASELINE_PROBE] for x in kv))
        for backend in self.baselines("launched", probe, probe):
            steps = GrowingSteps(tensors, length, most, None)
            dense[backend] = self.call(partial(within, BASELINES[backend], steps))
        for key, config in variants.items():
            calls[key] = self.call(GrowingSteps(tensors, length, counts[key], config))
        self.time("launched", dense, list(calls.values()))
        return self.decode_rows(length, LAUNCHED, calls, dense, {})

    def decode_rows(
        self,
        length: int,
        how: str,
        calls: dict[tuple[str, str], Timed],
        dense: dict[str, Timed],
        seconds: dict[str, float],
    ) -> Rows:
        """Rows of the `variants`. `how`: added to the name of a phase. `seconds`: a selection's, by
        settings."""
        variants, counts = self.plan.variants()
        most, rows = max(counts.values()), []
        for phase in (latency.AMORTISED, latency.REFRESHED):
            mine = {name: call for (kind, name), call in calls.items() if kind == phase}
            configs = {name: config for (kind, name), config in variants.items() if kind == phase}
            steps = {name: counts[phase, name] for name in mine}
            if not how:  # in a graph, where a dense call is the baseline's
                steps |= {name: most for name, call in mine.items() if call.said[0] == "dense"}
            shares = {name: took / refresh_period(configs[name]) for name, took in seconds.items()}
            measured = MeasuredRuns(phase + how, length, mine, dense, steps, most)
            rows += self.rows(measured, configs, shares)
        return rows

    def cell(self, kind: str, phases: Sequence[str], length: int) -> dict[str, Rows | list[str]]:
        """All rows of one of the `KINDS` at one length, and what has been refused so far."""
        with torch.no_grad():
            given = (length, phases) if kind == "prefill" else (length,)
            rows = getattr(self, kind)(*given)
        if self.clock.cuda:
            torch.cuda.empty_cache()
        return {"rows": rows, "refused": list(self.refused)}


def gpu_latency_rows(
    plan: latency.TimingPlan,
    phases: Sequence[str],
    lengths: Sequence[int],
    kept: Resumable | None = None,
    backends: Sequence[str] = tuple(BASELINES),
) -> tuple[Rows, list[str]]:
    """Rows of everything that `kept` has not yet, and which of PyTorch's `backends` refused
    what."""
    kept, rows, refused = kept or Resumable(), list[dict[str, Any]](), dict[str, None]()
    kinds = [kind for kind, asked in KINDS.items() if asked & set(phases)]
    for dtype in plan.dtypes:
        bench = Bench(plan, dtype, DeviceClock(plan.device), backends)
        for kind, length in product(kinds, lengths):
            what = f"{kind}, {dtype}, {plots.short(length)} tokens"
            key = (kind, dtype, plan.batch, length, sorted(phases))
            found = kept.get(key, partial(bench.cell, kind, phases, length), what)
            rows += found["rows"]
            refused |= dict.fromkeys(found["refused"])
    return rows, list(refused)
