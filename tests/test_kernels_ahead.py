"""`hip-hf kernels` finds tensor cores that wait for each instruction, and loops that load nothing ahead: on a small kernel that
is wrong. Prefill is not."""

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
    script = tmp_path / "wrong_kernel.py"  # the compiler reads the source; Transformers imports what is named `kernels`
    script.write_text(KERNELS + line)
    done = process(str(script))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tensor_cores_that_wait_for_each_instruction_are_found() -> None:
    """By the waits of the machine code: no more than the program asked for."""
    from hip_hf.kernels.budget import serialised

    ptx = "wgmma.mma_async.sync a;\nwgmma.mma_async.sync b;\nwgmma.wait_group.sync.aligned 0;\n"
    product, wait = "HGMMA.64x64x16.F32.BF16 R24, R8\n", "WARPGROUP.DEPBAR.LE gsb0, 0x0\n"
    assert not serialised(ptx, 2 * product + wait)
    assert serialised(ptx, 2 * (product + wait))


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
