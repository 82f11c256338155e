"""What works on this machine: versions and device, every check of `backends/triton/checks.py`, and
two timings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from hip_hf.backends.triton import checks, trust
from hip_hf.backends.triton.checks import Found, Heads
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import latency
from hip_hf.eval.measure.latency import TIMED_DTYPES, TimingPlan
from hip_hf.eval.reporting import report
from hip_hf.eval.reporting.resumable import Rows

GIB = 2**30
# Heads and settings that are tried on a machine without a GPU: what the interpreter does in
# seconds.
SMALL_HEADS = Heads(dim=32, dim_v=32, groups=2)
SIZES = dict(budget=32, block_q=32, block_k=8, sink=8, window=24, dense_tail=8, dense_below=0)
SMALL_SETTINGS = HiPConfig.from_dict({**SIZES, "beam": 2, "rescore": 2, "decode_refresh": 2})
PARTS = tuple(dict.fromkeys(part for part, _ in checks.CHECKS.values()))
# What to set where a part fails. With `auto` calls that need it are dense already.
INSTEAD = {
    checks.SPARSE: 'backend="torch" (slower), or attn_implementation="sdpa"',
    checks.GRADIENTS: 'training: backend="torch", or attn_implementation="sdpa"',
    checks.HYPER: 'method="hip", or backend="torch"',
    checks.DELTA: 'delta=None, or backend="torch"',
    checks.EXTENDED: 'extend=None, or backend="torch"',
}
# Heads of the timed calls: those of Llama 3.1 8B, on a CPU an eighth of them.
SHAPE: dict[str, Any] = {"cuda": dict(heads=32, kv_heads=8), "cpu": dict(heads=4, kv_heads=1)}
REPEATS = 3


def missing_for(device: torch.device) -> str:
    """Why the kernels cannot be tried on `device`; empty if they can."""
    why = trust.old_triton() if device.type == "cpu" else trust.lacking(device)
    if why or device.type == "cuda":
        return why
    from hip_hf.backends.triton.sparse import INTERPRETED

    none = "kernels run on a GPU, and none is tried here (TRITON_INTERPRET=1 interprets them)"
    return "" if INTERPRETED else none


def tried(
    device: torch.device, kinds: list[str], kernels: bool, parts: Sequence[str] = PARTS
) -> Iterator[tuple[str, Found]]:
    """What was found, with a name for backend and heads: of the kernels where they can run, and
    without a GPU, or in place of the kernels, of the torch backend."""
    gpu = device.type == "cuda"
    backends = ["triton"] * kernels + ["torch"] * (not kernels or not gpu)
    config, heads = (HiPConfig(dense_below=0), Heads()) if gpu else (SMALL_SETTINGS, SMALL_HEADS)
    work = [
        (backend, replace(heads, dtype=TIMED_DTYPES[kind]), kind)
        for backend in backends
        for kind in kinds
        if gpu or backend == "torch" or kind != "bf16"  # which Triton's interpreter does not know
    ]
    with report.progress() as progress:
        for backend, of, kind in progress.track(work, description="trying"):
            label = f"{'kernels' if backend == 'triton' else 'torch'}, {kind}, D={of.dim}"
            for part in parts:
                found = trust.self_test(device, of, part, config, backend)
                if gpu and backend == "triton":  # what models ask before they use kernels
                    trust.keep_verdict(device, of, part, found)
                yield from ((label, one) for one in found)


def check_row(label: str, found: Found) -> dict[str, Any]:
    """A line of the table."""
    return {
        "backend": label,
        "check": found.name,
        "works": "no" if found.problem else "yes",
        "error_of_allowed": found.error if found.error < float("inf") else None,
        "seconds": found.seconds,
        "problem": found.problem,
        "instead": INSTEAD[found.part] if found.problem else "",
    }


def timed(device: torch.device, kind: str, tokens: int) -> Rows:
    """Rows of a prompt and of decode steps with the default settings, sparse at any length, for
    that is what is to be timed."""
    what = (tokens,), (tokens,), (kind,), {"defaults": HiPConfig(dense_below=0)}
    plan = TimingPlan(*what, repeats=REPEATS, device=device, **SHAPE[device.type])
    if device.type == "cpu":
        return latency.latency_rows(plan)
    if trust.lacking(device):
        return []
    from hip_hf.eval.measure import gpu_latency

    return gpu_latency.gpu_latency_rows(plan, ("prefill", "decode"), (tokens,))[0]


def facts(device: torch.device, missing: str) -> dict[str, Any]:
    """The machine, as far as results depend on it; `kernels`: whether they can run, or what is
    missing."""
    about = {name: value for name, value in report.machine().items() if value is not None}
    if not trust.old_triton():
        import triton

        about["triton"] = triton.__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / GIB, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "driver": ", ".join(trust.drivers()),
        }
        if not missing:
            from hip_hf.backends.triton.common.tuning import TILES, target_of

            target = target_of(torch.empty(0, device=device))
            own = all(target in targets for targets in TILES.values())
            whose = "this" if own else "the closest older"
            about |= {"target": target, "launch_table": f"of {whose} target"}
    return about | {"kernels": missing or "can run"}
