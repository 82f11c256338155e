"""`hip-hf latency --device cuda`: one attention call on a GPU against PyTorch's FlashAttention and
cuDNN, the faster of the two.

Prefill is one causal call over the whole context, `selection` what finds its key blocks, `backward`
the gradients of q, k and v. Decode steps run from CUDA graphs on both sides, since a step is
shorter than what launching it takes: a graph holds as many steps as make whole selections and key
blocks, which share selections as in generation (*amortised*) or not (*refreshed*). *Launched* are
as many steps without a graph, ours through all that a model's layer calls: what the host takes is
in them. Times are those of the device's own events, its second-level cache emptied before each run.
Without a GPU everything runs the same on a CPU, by its clock and without graphs (the kernels by
Triton's interpreter): to be tested, not to be believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hip_hf.attention import dense_reason
from hip_hf.backends.triton import ops
from hip_hf.backends.triton.common.tuning import processors, target_of
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import kernel_costs, latency
from hip_hf.eval.measure.gpu_runs import CapturedSteps, DeviceClock, Timed, Work, captured
from hip_hf.eval.measure.latency import GrowingSteps, interleave, ours, refresh_period, sdpa
from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.resumable import Resumable
from hip_hf.problem import AttentionProblem, make_spans

GPU_LENGTHS = [8192 * 2**i for i in range(8)]  # 8K to 1M
TIMED_METHODS = ("hip", "streaming", "hyper", "dense")  # hyper decodes densely
BACKWARD, SELECTION, DECODE_SELECTION = "backward", "selection", "decode selection"
# Of a decode step without a graph, after the name of its phase.
LAUNCHED = ", launched"
BASELINES = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# What the model in docs/performance.md takes each phase for; all others are decode steps.
KERNELS = {
    latency.PREFILL: kernel_costs.prompt_kernels,
    SELECTION: kernel_costs.selection_kernels,
    DECODE_SELECTION: kernel_costs.refresh_kernels,
    BACKWARD: kernel_costs.gradient_kernels,
}
DENSE_COSTS = {latency.PREFILL: kernel_costs.dense_prefill, BACKWARD: kernel_costs.dense_gradients}
# Enough of a call to know whether a backend takes it.
BASELINE_PROBE = 256


def within(backend: SDPBackend, run: Work) -> Any:
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
    def device(self) -> torch.device:
        return self.plan.device

    @property
    def shape(self) -> kernel_costs.Shape:
        heads, size = (
            (self.plan.heads, self.plan.kv_heads, self.plan.head_dim),
            latency.TIMED_DTYPES[self.dtype].itemsize,
        )
        like = torch.empty(0, device=self.device)
        return kernel_costs.Shape(*heads, size, target_of(like), processors(like), self.plan.batch)

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
        self.refused[f"{what}, {self.dtype}: {name}: {str(error).strip().splitlines()[0]}"] = None

    def cost(
        self, phase: str, length: int, config: HiPConfig, path: str
    ) -> kernel_costs.KernelCost | None:
        """FLOPs and bytes of a step by the model in docs/performance.md, which knows `hip` and
        dense attention."""
        if path == "dense":
            one = DENSE_COSTS.get(phase, kernel_costs.dense_decode)(length, self.shape)
        elif config.method != "hip":
            return None
        elif phase in KERNELS:
            one = kernel_costs.call_total(KERNELS[phase](length, config, self.shape))
        else:
            one = kernel_costs.call_total(
                kernel_costs.step_kernels(length, config, self.shape, refresh_period(config))
            )
        return one.times(self.plan.batch)

    def rows(
        self, measured: MeasuredRuns, configs: dict[str, HiPConfig], selections: dict[str, float]
    ) -> list[dict[str, Any]]:
        """Rows of the report. `selections`: seconds of a step that go to selection."""
        best = min(measured.dense.items(), key=lambda item: median(item[1].seconds), default=None)
        dense = None if best is None else median(best[1].seconds) / measured.dense_steps
        name = torch.cuda.get_device_name(self.device) if self.clock.cuda else "CPU"
        gpu = kernel_costs.gpu_of(name)
        found = []
        for name, call in measured.ours.items():
            path, reason = call.said
            seconds = median(call.seconds) / measured.steps[name]
            cost = self.cost(measured.phase, measured.length, configs[name], path)
            least = cost.milliseconds(gpu) if cost and gpu else None
            found.append(
                {
                    "phase": measured.phase,
                    "dtype": self.dtype,
                    "batch": self.plan.batch,
                    "length": measured.length,
                    "settings": name,
                    "hip_ms": 1000 * seconds,
                    "sdpa_ms": None if dense is None else 1000 * dense,
                    "sdpa": "-" if best is None else best[0],
                    "times_faster": None if dense is None else dense / seconds,
                    "tokens_per_s": self.plan.batch * measured.tokens / seconds,
                    "tflops": None if cost is None else cost.flops / seconds / 1e12,
                    "gb_per_s": None if cost is None else cost.bytes / seconds / 1e9,
                    "over_floor": None if least is None else 1000 * seconds / least,
                    "selecting": None
                    if path == "dense" or name not in selections
                    else selections[name] / seconds,
                    "peak_gb": call.peak,
                    "sdpa_peak_gb": None if best is None else best[1].peak,
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

    def prefill(self, length: int, phases: Sequence[str]) -> Iterable[dict[str, Any]]:
        """Rows of prefill and of its selection."""
        plan = self.plan
        q, k, v = plan.random(self.dtype, length, length, self.device)
        problem = AttentionProblem(q, k, v, make_spans(q, k), plan.head_dim**-0.5)
        table, _ = ops.make_table(q, k, None, None, 0)
        calls, dense, searches = {}, {}, {}
        for name, config in plan.settings.items():
            if config.method == "hip" and not dense_reason(problem, config, None, False)[0]:
                run = partial(
                    ops.select,
                    q,
                    k,
                    None,
                    table,
                    config.text,
                    problem.scale,
                    None,
                    None,
                    config.block_q,
                )
                searches[name] = self.call(run)
            if "prefill" in phases:
                calls[name] = self.call(partial(ours, q, k, v, config))
        if "prefill" in phases:
            probe = partial(sdpa, *(x[:, :, :BASELINE_PROBE] for x in (q, k, v)))
            dense = {
                name: self.call(run)
                for name, run in self.baselines(
                    latency.PREFILL, probe, partial(sdpa, q, k, v)
                ).items()
            }
        self.time(latency.PREFILL, dense, [*calls.values(), *searches.values()])
        once, taken = (
            dict.fromkeys(plan.settings, 1),
            {name: median(call.seconds) for name, call in searches.items()},
        )
        yield from self.rows(
            MeasuredRuns(latency.PREFILL, length, calls, dense, once, tokens=length),
            plan.settings,
            taken,
        )
        if "selection" in phases:
            yield from self.rows(
                MeasuredRuns(SELECTION, length, searches, {}, once, tokens=length),
                plan.settings,
                taken,
            )

    def backward(self, length: int) -> list[dict[str, Any]]:
        """Rows of the gradients alone; the forward pass before them is not timed."""
        plan = self.plan
        q, k, v = leaves = tuple(
            x.requires_grad_() for x in plan.random(self.dtype, length, length, self.device)
        )
        grad = torch.ones_like(q)

        def pull(
            out: torch.Tensor, into: Sequence[torch.Tensor], by: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, into, by, retain_graph=True)

        small = [x.detach()[:, :, :BASELINE_PROBE].requires_grad_() for x in leaves]
        with torch.enable_grad():
            runs = self.baselines(
                BACKWARD,
                lambda: pull(sdpa(*small), small, torch.ones_like(small[0])),
                lambda: partial(pull, sdpa(*leaves), leaves, grad),
            )
            dense = {name: self.call(make()) for name, make in runs.items()}
            calls = {}
            for name, config in plan.settings.items():
                result = ours(q, k, v, config)
                calls[name] = self.call(partial(pull, result.out, leaves, grad))
                calls[name].said = result.path, result.reason
        self.time(BACKWARD, dense, list(calls.values()))
        measured = MeasuredRuns(
            BACKWARD, length, calls, dense, dict.fromkeys(plan.settings, 1), tokens=length
        )
        return self.rows(measured, plan.settings, {})

    def decode(self, length: int) -> list[dict[str, Any]]:
        """Rows of decode steps, amortised and refreshed, and of a step's selection."""
        plan = self.plan
        variants, counts = self.plan.variants()
        most = max(counts.values())
        q, k, v = plan.random(self.dtype, length + most, most, self.device)

        def dense_steps() -> None:
            for step in range(most):
                end = length + step + 1
                sdpa(q[:, :, step : step + 1], k[:, :, :end], v[:, :, :end])

        probe = partial(sdpa, q[:, :, :1], *(x[:, :, :BASELINE_PROBE] for x in (k, v)))
        runs = self.baselines("decode", probe, dense_steps)
        dense = {name: self.call(captured(run, self.device)) for name, run in runs.items()}
        calls, alone, made = {}, {}, dict[str, CapturedSteps]()
        for key, config in variants.items():
            tensors = q[:, :, :1], k[:, :, :length], v[:, :, :length]
            problem = AttentionProblem(*tensors, make_spans(*tensors[:2]), plan.head_dim**-0.5)
            reason, _ = dense_reason(problem, config, None, False)
            if reason:
                calls[key] = self.call(captured(dense_steps, self.device))
                calls[key].said = ("dense", reason)
                continue
            own = CapturedSteps(
                q,
                k,
                v,
                length,
                counts[key],
                config,
                state=made[key[1]].state if key[1] in made else None,
            )
            made[key[1]] = own  # the keys are summarised once
            calls[key] = self.call(captured(own, self.device))
            if key[0] == latency.REFRESHED and config.method == "hip":
                select_only = CapturedSteps(
                    q, k, v, length, counts[key], config, attend=False, state=own.state
                )
                alone[key[1]] = self.call(captured(select_only, self.device))
        self.time("decode", dense, [*calls.values(), *alone.values()])
        seconds = {
            name: median(call.seconds) / counts[latency.REFRESHED, name]
            for name, call in alone.items()
        }
        rows = self.decode_rows(length, "", calls, dense, seconds)
        steps = {name: counts[latency.REFRESHED, name] for name in alone}
        return rows + self.rows(
            MeasuredRuns(DECODE_SELECTION, length, alone, {}, steps), plan.settings, seconds
        )

    def launched(self, length: int) -> list[dict[str, Any]]:
        """Rows of decode steps without graphs, on a cache that grows from run to run."""
        plan = self.plan
        variants, counts = self.plan.variants()
        most = max(counts.values())
        tensors = plan.random(self.dtype, length + most * (plan.repeats + 1), most, self.device)
        probe = partial(
            sdpa, tensors[0][:, :, :1], *(x[:, :, :BASELINE_PROBE] for x in tensors[1:])
        )
        dense = {}
        for backend in self.baselines("launched", probe, probe):
            dense[backend] = self.call(
                partial(within, BASELINES[backend], GrowingSteps(tensors, length, most, None))
            )
        calls = {
            key: self.call(GrowingSteps(tensors, length, counts[key], config))
            for key, config in variants.items()
        }
        self.time("launched", dense, list(calls.values()))
        return self.decode_rows(length, LAUNCHED, calls, dense, {})

    def decode_rows(
        self,
        length: int,
        how: str,
        calls: dict[tuple[str, str], Timed],
        dense: dict[str, Timed],
        seconds: dict[str, float],
    ) -> list[dict[str, Any]]:
        """Rows of the `variants`. `how`: added to the name of a phase. `seconds`: a selection's, by
        settings."""
        variants, counts = self.plan.variants()
        most, rows = max(counts.values()), []
        for phase in (latency.AMORTISED, latency.REFRESHED):
            mine = {name: call for (kind, name), call in calls.items() if kind == phase}
            configs = {name: config for (kind, name), config in variants.items() if kind == phase}
            in_graph = not how  # where a dense call is the baseline's
            steps = {
                name: most if in_graph and call.said[0] == "dense" else counts[phase, name]
                for name, call in mine.items()
            }
            shares = {
                name: taken / refresh_period(configs[name]) for name, taken in seconds.items()
            }
            rows += self.rows(
                MeasuredRuns(phase + how, length, mine, dense, steps, most), configs, shares
            )
        return rows


def measure(
    plan: latency.TimingPlan,
    phases: Sequence[str],
    lengths: Sequence[int],
    kept: Resumable | None = None,
    backends: Sequence[str] = tuple(BASELINES),
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of everything that `kept` has not yet, and which of PyTorch's `backends` refused
    what."""
    kept = kept or Resumable()
    rows: list[dict[str, Any]] = []
    refused: dict[str, None] = {}
    kinds = {
        "prefill": {"prefill", "selection"},
        **{name: {name} for name in ("decode", "launched", "backward")},
    }
    for dtype in plan.dtypes:
        bench = Bench(plan, dtype, DeviceClock(plan.device), backends)
        run = {name: getattr(bench, name) for name in kinds} | {
            "prefill": partial(bench.prefill, phases=phases)
        }
        for kind in (kind for kind, asked in kinds.items() if asked & set(phases)):
            for length in lengths:

                def work(
                    kind: str = kind, length: int = length, bench: Bench = bench, run: Any = run
                ) -> dict[str, Any]:
                    with torch.no_grad():
                        found = list(run[kind](length))
                    if bench.clock.cuda:
                        torch.cuda.empty_cache()
                    return {"rows": found, "refused": list(bench.refused)}

                what = f"{kind}, {dtype}, {plots.short(length)} tokens"
                found = kept.get((kind, dtype, plan.batch, length, sorted(phases)), work, what)
                rows += found["rows"]
                refused |= dict.fromkeys(found["refused"])
    return rows, list(refused)
