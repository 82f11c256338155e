"""`hip-hf kernels` finds kernels whose tensor cores wait for each instruction and loops that load nothing ahead: on small kernels
that are wrong, and on prefill, which is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_kernels_compile import process

KERNELS = """
import sys
import torch, triton, triton.language as tl
from hip_hf.kernels import budget
from hip_hf.kernels.compiled import Launch, Pointer

@triton.jit
def turns(X, Y, OUT, first, second, N: tl.constexpr, APART: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    x, acc = tl.load(X + at), tl.zeros([N, N], tl.float32)
    if first > 0:
        for i in range(first):
            acc = tl.dot(x, tl.load(Y + i * N * N + at), acc * 0.5)
    if APART:
        acc *= second
    for i in range(second):
        acc = tl.dot(x, tl.load(Y + i * N * N + at), acc * 0.25)
    tl.store(OUT + at, acc)

@triton.jit
def gathered(X, Y, IDS, OUT, steps, N: tl.constexpr, CARRIED: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    x, acc = tl.load(X + at), tl.zeros([N, N], tl.float32)
    ids = tl.load(IDS + n)
    for i in range(steps):
        if not CARRIED:
            ids = tl.load(IDS + i * N + n)
        acc = tl.dot(x, tl.load(Y + ids[:, None] * N + n[None, :]), acc)
        if CARRIED:
            ids = tl.load(IDS + (i + 1) * N + n)
    tl.store(OUT + at, acc)

def problem(kernel, target, **arguments):
    halves = {name: Pointer(torch.bfloat16) for name in ("X", "Y")}
    given = dict(**halves, OUT=Pointer(torch.float32), N=64, num_warps=4, **arguments)
    return budget.spend(Launch("wrong", kernel, given, True), target, 64, torch.bfloat16).problem
"""


def printed(tmp_path: Path, line: str) -> str:
    script = tmp_path / "kernels.py"  # the compiler reads the source
    script.write_text(KERNELS + line)
    done = process(str(script))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tensor_cores_that_wait_for_each_instruction_are_found(tmp_path: Path) -> None:
    line = 'print(*[problem(turns, "sm90", first=5, second=7, APART=apart) for apart in (False, True)], sep="|")'
    assert printed(tmp_path, line) == "tensor cores wait for each instruction|"


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_loops_that_load_nothing_ahead_are_found(tmp_path: Path, target: str) -> None:
    """Three stages are asked for in vain where what is multiplied lies where an index of the same turn says."""
    ids = "IDS=Pointer(torch.int32), steps=9, num_stages=3"
    line = f'print(*[problem(gathered, "{target}", {ids}, CARRIED=carried) for carried in (False, True)], sep="|")'
    assert printed(tmp_path, line) == "loads nothing ahead|"


PREFILL = """
import torch
from hip_hf.kernels import budget, prefill

(launch,) = [x for x in prefill.launches(64, torch.bfloat16, "sm90") if x.name == "prefill"]
row = budget.spend(launch, "sm90", 64, torch.bfloat16)
print(row.problem, row.path, row.ahead)
"""


def test_prefill_multiplies_without_waiting_and_loads_ahead() -> None:
    done = process("-c", PREFILL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "wgmma 2"
