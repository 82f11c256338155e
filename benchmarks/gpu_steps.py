"""What each step of `gpu_run.py` measures, in a process of its own. Where something fails, the rest
of the step goes on.

Every figure is a row, kept as soon as it is measured; `wrong` of a row says which number is not
what it must be.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, product, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import roofline
import torch
import tune
from gpu_run import MACHINE
from gpu_sizes import KERNEL_TESTS, ROOT, Sizes
from torch.autograd import DeviceType

from hip_hf.backends.triton import trust
from hip_hf.backends.triton.common.tuning import target_of
from hip_hf.backends.triton.pyramid import KeyPyramid
from hip_hf.backends.triton.sparse import ROOM
from hip_hf.cli.inputs import load_to_measure
from hip_hf.cli.presets import over_budgets
from hip_hf.cli.publish import write_file
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import doctor, documents, gpu_latency, losses, needles, real_model
from hip_hf.eval.measure.generate import generate
from hip_hf.eval.measure.gpu_runs import DeviceClock, Timed
from hip_hf.eval.measure.latency import (
    TIMED_DTYPES,
    GrowingSteps,
    TimingPlan,
    baseline,
    interleave,
    ours,
    refresh_period,
)
from hip_hf.eval.measure.passkey import use
from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.resumable import Resumable
from hip_hf.shown import said

Rows = list[dict[str, Any]]

# Products of a row's numbers in half precision miss by less than this many of its units, as a share
# of the row.
UNITS = 2.0
# Bytes of a GPU that decode steps leave free beside what grows with the batch: workspaces, graphs,
# what is cut into pieces.
SPARE = 2 << 30


class Run:
    """What a step is given: the sizes, and `kept`, which hold the rows as they come
    (`{"rows": [...]}` each)."""

    def __init__(self, step: str, folder: Path, sizes: Sizes) -> None:
        self.sizes, self.device = sizes, torch.device(sizes.device)
        sizes_said = {name: str(value) for name, value in asdict(sizes).items() if name != "model"}
        self.kept = Resumable(folder / f"{step}.json", {"step": step, "sizes": sizes_said})
        self.failed: list[str] = []

    def piece(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; None if it fails, which is noted."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{name}: {said(error)}")
            return None
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def keep(self, name: str, work: Callable[[], Rows]) -> Rows | None:
        """The rows of a piece, measured now or before."""
        return self.piece(name, lambda: self.kept.get((name,), lambda: {"rows": work()})["rows"])

    def latency(
        self, plan: TimingPlan, phase: Sequence[str], length: int, **options: Any
    ) -> Rows | None:
        name = f"{phase[0]}, {plots.short(length)} tokens, batch {plan.batch}"
        run = partial(gpu_latency.gpu_latency_rows, plan, phase, [length], kept=self.kept)
        return self.piece(name, lambda: run(**options)[0])


def doctor_step(run: Run) -> None:
    """Every kernel against float64, in each dtype."""
    missing = doctor.missing_for(run.device)
    if missing:
        raise RuntimeError(missing)

    def checked(kind: str, part: str) -> Rows:
        rows = [
            doctor.check_row(label, found)
            for label, found in doctor.tried(run.device, [kind], True, [part])
        ]
        return [{**row, "wrong": row["problem"]} for row in rows]

    for kind, part in product(run.sizes.checks, run.sizes.parts):
        run.keep(f"{kind}, {part}", partial(checked, kind, part))


class Outcomes:
    """A plug-in of pytest that keeps how each test went as soon as it is known; its workers (xdist)
    report to it."""

    def __init__(self, kept: Resumable) -> None:
        self.kept = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return  # it was set up or torn down
        crash = getattr(report.longrepr, "reprcrash", None)
        why = (
            str(crash.message if crash else report.longrepr).strip().partition("\n")[0]
            if report.failed
            else ""
        )
        row = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": report.duration,
            "wrong": why,
        }
        self.kept.get((report.nodeid, report.when), lambda: {"rows": [row]})


def tests_step(run: Run, half: int) -> None:
    """Half of the kernel tests, in several processes where pytest-xdist is there."""
    import pytest

    names = run.sizes.tests[half]
    known = {cell["rows"][0]["test"] for cell in run.kept.done.values()}
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    options += [part for test in known for part in ("--deselect", test)]
    if find_spec("xdist") and run.sizes.processes > 1:
        options += ["--numprocesses", str(run.sizes.processes), "--dist", "worksteal"]
    files = [str(KERNEL_TESTS / name) for name in names]
    code = pytest.main([*options, *files], plugins=[Outcomes(run.kept)])
    ended = (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
        *([pytest.ExitCode.NO_TESTS_COLLECTED] if known else []),
    )
    if code not in ended:
        raise RuntimeError(f"pytest ended with {code!r}")


@torch.no_grad()
def agreement(plan: TimingPlan, length: int) -> Rows:
    """Rows that read every key against dense attention, at sizes that no test has: the first ones,
    and the last."""
    (dtype,), (config,) = plan.dtypes, plan.settings.values()
    q, k, v = plan.random(dtype, length, length)
    result = ours(q, k, v, config)
    first = min(config.sparse_reach - config.budget, length)
    pairs = {
        "first": (
            result.out[:, :, :first],
            baseline(q[:, :, :first], k[:, :, :first], v[:, :, :first]),
        )
    }
    pairs["last"] = (result.out[:, :, -1:], baseline(q[:, :, -1:], k, v))
    allowed = UNITS * torch.finfo(TIMED_DTYPES[dtype]).eps
    rows = []
    for name, (got, want) in pairs.items():
        error = float((got - want).norm(dtype=torch.float32) / want.norm(dtype=torch.float32))
        wrong = (
            ""
            if error <= allowed
            else f"the {name} rows of {length} tokens miss dense attention by {error:.3g}"
        )
        rows.append(
            {
                "rows": name,
                "length": length,
                "error": error,
                "allowed": allowed,
                "path": result.path,
                "wrong": wrong,
            }
        )
    if not torch.isfinite(result.out).all():
        rows[0]["wrong"] = f"not every number of {length} tokens is finite"
    return rows


def prefill_step(run: Run) -> None:
    """Prompts and their selection against the faster of FlashAttention and cuDNN; of the longest
    against the one that was faster before, since each takes some 15 s there."""
    lengths, plan, backends = run.sizes.prefill, run.sizes.plan(), tuple(gpu_latency.BASELINES)
    for length in lengths:
        run.keep(f"agreement, {plots.short(length)}", partial(agreement, plan, length))
        found = run.latency(plan, ("prefill", "selection"), length, backends=backends)
        if found and length == lengths[-2] and found[0]["sdpa"] in backends:
            backends = (found[0]["sdpa"],)


def free_bytes(device: torch.device) -> float:
    """Of the GPU's memory; without one nobody counts."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def fitting(plan: TimingPlan, length: int, free: float) -> int:
    """The largest batch, up to the plan's and at least one, whose decode steps at `length` keys fit
    into `free` bytes: keys and values, and the summaries of two kept states (amortised and
    refreshed, which are there at a time without graphs)."""
    (dtype,), (config,) = (TIMED_DTYPES[name] for name in plan.dtypes), plan.settings.values()
    shape = (1, plan.kv_heads, plan.head_dim, int(length * (1 + ROOM)))
    pyramid = KeyPyramid.empty(config, shape, torch.empty(0, dtype=dtype, device="meta"))
    keys_and_values = 2 * plan.kv_heads * plan.head_dim * dtype.itemsize * length
    return int(max(1, min(plan.batch, (free - SPARE) // (keys_and_values + 2 * pyramid.nbytes))))


def decode_step(run: Run) -> None:
    """Decode steps in CUDA graphs and launched one by one, of one sequence and of as many as are
    asked for and fit."""
    for batch, length in product(run.sizes.batches, run.sizes.decode):
        plan = run.sizes.plan(batch=batch)
        plan = replace(plan, batch=fitting(plan, length, free_bytes(run.device)))
        for phase in ("decode", "launched"):
            run.latency(plan, (phase,), length)


def backward_step(run: Run) -> None:
    """Gradients of prompts, the forward pass before them not counted."""
    for length in run.sizes.backward:
        run.latency(run.sizes.plan(), ("backward",), length)


@torch.no_grad()
def parts_of(
    what: str, length: int, device: torch.device, work: Callable[[], Any], steps: int, repeats: int
) -> Rows:
    """Where the time of a call goes, in milliseconds a step: the whole by the device's clock, what
    the host takes until it has launched everything, each kernel, and what is left between them.
    Without a GPU operators stand for kernels."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    timed = Timed(work, DeviceClock(device))
    interleave([timed], repeats)
    wait()
    start = time.perf_counter()
    work()
    host = time.perf_counter() - start
    wait()
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if cuda else []),
    ]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        wait()
    of = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == of]
    spent = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        for event in events
    }
    whole, kernels, launches = (
        median(timed.seconds),
        sum(spent.values()),
        sum(event.count for event in events),
    )
    parts = [
        ("whole", None, whole),
        ("host", None, host),
        ("kernels", launches, kernels),
        ("gaps", None, whole - kernels),
    ]
    parts += sorted(
        ((event.key, event.count, spent[event.key]) for event in events), key=lambda part: -part[2]
    )
    own = dict(what=what, length=length)
    return [
        {**own, "part": name, "launches": n and n / steps, "ms": 1000 * seconds / steps}
        for name, n, seconds in parts
    ]


def profile_step(run: Run) -> None:
    """A layer's attention in a prompt, and in decode steps without a graph; then HyperAttention,
    Delta and gradients."""
    sizes, plan = run.sizes, run.sizes.plan()
    count = math.lcm(refresh_period(sizes.settings), sizes.settings.block_k)
    runs = sizes.repeats + 3  # one to warm up, one for the host, one for the profiler

    def prompt(length: int, what: str = "prompt", settings: HiPConfig = sizes.settings) -> Rows:
        q, k, v = plan.random(sizes.dtype, length, length)
        work = partial(ours, q, k, v, settings)
        return parts_of(what, length, plan.device, work, 1, sizes.repeats)

    def gradients(length: int) -> Rows:
        q, k, v = leaves = plan.random(sizes.dtype, length, length)
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            out = ours(q, k, v, sizes.settings).out
        pull = partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)
        return parts_of("gradients", length, plan.device, pull, 1, sizes.repeats)

    def steps(length: int) -> Rows:
        tensors = plan.random(sizes.dtype, length + runs * count, count)
        work = GrowingSteps(tensors, length, count, sizes.settings)
        return parts_of("decode", length, plan.device, work, count, sizes.repeats)

    for length in sizes.prefill:
        run.keep(f"prompt, {plots.short(length)}", partial(prompt, length))
    for length in sizes.decode:
        run.keep(f"decode, {plots.short(length)}", partial(steps, length))
    others = {
        "hyper": dict(method="hyper", options=sizes.hyper),
        "delta": dict(delta=roofline.GAMMA),
    }
    for what, fields in others.items():
        length = sizes.prefill[1]
        run.keep(
            f"{what}, {plots.short(length)}",
            partial(prompt, length, what, replace(sizes.settings, **fields)),
        )
    run.keep(
        f"gradients, {plots.short(sizes.backward[-1])}", partial(gradients, sizes.backward[-1])
    )


def tune_step(run: Run) -> None:
    """Other launches of attention and selection beside today's, kernel by kernel in turn, those
    first that `tune.py` prefers."""
    sizes, dtype = run.sizes, TIMED_DTYPES[run.sizes.dtype]
    target = target_of(torch.empty(0, device=run.device))

    def timed(kernel: str, tile: Any, present: Any) -> Rows:
        row = {
            "kernel": kernel,
            "tile": str(tile),
            "present": str(present),
            "ms": None,
            "present_ms": None,
            "problem": "",
        }
        try:
            call = dict(
                device=sizes.device, dtype=dtype, tokens=sizes.tuned, repeats=sizes.tune_repeats
            )
            row["ms"], row["present_ms"] = tune.milliseconds(
                kernel, sizes.dim, [tile, present], **call
            )
        except Exception as error:  # one that does not fit is an answer, too
            row["problem"] = said(error)
        return [row]

    todo = []
    for kernel in sizes.kernels:
        present = tune.present(kernel, target, sizes.dim, dtype)
        others = [tile for tile in tune.candidates(kernel, target, sizes.dim) if tile != present]
        todo.append([(kernel, tile, present) for tile in others[: sizes.candidates]])
    for kernel, tile, present in filter(None, chain.from_iterable(zip_longest(*todo))):
        run.keep(f"{kernel}, {tile}", partial(timed, kernel, tile, present))


class Forward(Timed):
    """A model's pass over a prompt; its attention is set before the clock starts."""

    def __init__(
        self, model: Any, ids: Sequence[int], config: HiPConfig, clock: DeviceClock
    ) -> None:
        super().__init__(partial(losses.hidden_of, model, ids), clock)
        self.model, self.config = model, config

    def once(self) -> float:
        use(self.model, self.config)
        return super().once()


def random_model(sizes: Sizes, device: torch.device) -> Any:
    """A Llama whose weights are drawn: what it says means nothing, what it takes does."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with device:
        config = LlamaConfig(**sizes.shape)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=TIMED_DTYPES[sizes.model_dtype]
        )
    model.generation_config.eos_token_id = None  # every run has as many tokens
    return model.eval()


def speed(run: Run, loaded: Any, ids: Sequence[int], every: HiPConfig, weights: str) -> None:
    """What a prompt takes, and greedy generation: dense, with the default settings, and with all
    layers and rows sparse."""
    configs = {"dense": HiPConfig(method="dense"), "defaults": HiPConfig(), "all sparse": every}
    own = dict(weights=weights, length=len(ids))

    def prompts() -> Rows:
        calls = {
            name: Forward(loaded, ids, config, DeviceClock(run.device))
            for name, config in configs.items()
        }
        interleave(list(calls.values()), run.sizes.repeats)
        return [
            {
                **own,
                "settings": name,
                "prompt_ms": 1000 * median(call.seconds),
                "runs": len(call.seconds),
            }
            for name, call in calls.items()
        ]

    def generation(name: str) -> Rows:
        use(loaded, configs[name])
        for _ in range(2):  # the first compiles
            result = generate(loaded, list(ids), run.sizes.new_tokens)
        return [{**own, "settings": name, "tokens_per_s": result.tokens_per_s}]

    run.keep(f"prompt, {weights}", prompts)
    for name in configs:
        run.keep(f"generation, {weights}, {name}", partial(generation, name))


@torch.no_grad()
def model_step(run: Run) -> None:
    """A real model: pass keys that it reads, what a prompt takes, and greedy generation, dense and
    sparse. Where its file did not travel with the tree, the times of one with random weights."""
    sizes, name = run.sizes, str(run.sizes.model)
    if not real_model.is_complete(sizes.model):
        (every,) = over_budgets(
            ["defaults"], [sizes.budget], tokens=sizes.long_prompt, checkpoint=""
        ).values()
        drawn = torch.randint(
            sizes.shape["vocab_size"],
            (sizes.long_prompt,),
            generator=torch.Generator().manual_seed(0),
        )
        speed(run, random_model(sizes, run.device), drawn.tolist(), every, "random")
        return
    loaded, tokenizer, _ = load_to_measure(name, sizes.device, "", sizes.model_dtype)
    text = tokenizer.encode(
        documents.DOCUMENT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    )
    configs = over_budgets(
        ["dense", "defaults"], [sizes.budget], tokens=sizes.prompt, checkpoint=name
    )
    plan = needles.NeedlesPlan(configs, [sizes.prompt], prompts=1)
    prompt = plan.prompt(tokenizer, text, sizes.prompt, 0)

    def quality() -> Rows:
        rows = needles.needles_rows(
            loaded, tokenizer, {needles.NOVEL: text}, plan, Resumable(None, {})
        )
        return [
            {
                **row,
                "wrong": ""
                if math.isfinite(row["nll"])
                else f"{row['settings']}: nll is {row['nll']}",
            }
            for row in rows
        ]

    run.keep("quality", quality)
    speed(run, loaded, prompt.ids, configs["defaults"], sizes.model.name)


STEPS: dict[str, Callable[[Run], None]] = {
    "doctor": doctor_step,
    "tests": partial(tests_step, half=0),
    "prefill": prefill_step,
    "decode": decode_step,
    "profile": profile_step,
    "more_tests": partial(tests_step, half=1),
    "backward": backward_step,
    "tune": tune_step,
    "model": model_step,
}


def settle(folder: Path, device: torch.device) -> None:
    """Put down the machine, versions and kernels of a run. Raises ValueError for a folder that
    belongs to others."""
    file, about = (
        folder / MACHINE,
        {**doctor.facts(device, doctor.missing_for(device)), "code": trust.code()},
    )
    about = json.loads(json.dumps(about))
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else about
    if before != about:
        names = sorted(
            name for name in before.keys() | about if before.get(name) != about.get(name)
        )
        raise ValueError(
            f"FOLDER: got {str(folder)!r} with figures of another {', '.join(names)}, "
            "allowed: a new folder"
        )
    write_file(file, json.dumps(about, indent=1) + "\n")


def take(name: str, folder: Path, sizes: Sizes) -> int:
    """Do a step, whose rows are kept as they come: the exit status of its process. The last line of
    its output says why."""
    run = Run(name, folder, sizes)
    settle(folder, run.device)
    STEPS[name](run)
    if run.failed:
        print("; ".join(run.failed))
    return 1 if run.failed else 0
