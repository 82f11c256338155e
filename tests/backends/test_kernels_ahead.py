"""`hip-hf kernels` finds tensor cores that wait for each instruction, programs that touch what they
work on, and loops that load nothing ahead: in a small kernel that is wrong. Prefill is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import process

from hip_hf.backends.triton.compile.wgmma import touched

KERNELS = """
import sys
import torch, triton, triton.language as tl
from hip_hf.backends.triton.compile import budget
from hip_hf.backends.triton.compile.launch import Launch
from triton.runtime.jit import MockTensor as Pointer

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

@triton.jit
def kept(X, Y, IDS, OUT, steps, N: tl.constexpr, AHEAD: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    x, y, acc = tl.load(X + at), tl.load(Y + at), tl.zeros([N, N], tl.float32)
    for i in range(steps):
        if AHEAD:
            y = tl.load(Y + i * N * N + at)
        acc = tl.dot(x, y, acc)
    tl.store(OUT + at, acc)

def problem(kernel, target, **arguments):
    halves = {name: Pointer(torch.bfloat16) for name in ("X", "Y")}
    given = dict(**halves, OUT=Pointer(torch.float32), N=64, num_warps=4, **arguments)
    return budget.spend(Launch("wrong", kernel, given, True), target, 64, torch.bfloat16).problem
"""


def printed(tmp_path: Path, line: str) -> str:
    # the compiler reads the source; Transformers imports what is named `kernels`
    script = tmp_path / "wrong_kernel.py"
    script.write_text(KERNELS + line)
    done = process(str(script))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WITHOUT_A_WAIT = """
import subprocess, tempfile
from pathlib import Path
from hip_hf.backends.triton.compile import wgmma

def ptxas(ptx):
    # the machine code, and what the assembler says of it
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "a.ptx"), Path(folder, "a.cubin")
        source.write_text(ptx)
        options = ["-v", "--gpu-name=sm_90a", str(source), "-o", str(binary)]
        command = [triton.knobs.nvidia.ptxas.path, *options]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        return budget._told("nvdisasm", "-c", binary=binary.read_bytes()), said.stderr

given = dict(X=Pointer(torch.bfloat16), Y=Pointer(torch.bfloat16), IDS=Pointer(torch.int32))
given |= dict(OUT=Pointer(torch.float32), steps=9)
with budget.compiling_for("sm90"):
    compiled = gathered.warmup(grid=(1,), N=64, CARRIED=True, num_warps=4, num_stages=3, **given)
compiled = compiled.result() if callable(getattr(compiled, "result", None)) else compiled
right = compiled.asm["ptx"]
wrong = right.replace("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;")
for ptx in (right, wrong):
    code, said = ptxas(ptx)
    found = ("are serialized" in said, budget.serialised(ptx, code), bool(wgmma.touched(ptx)))
    print(*found, sep=",", end="|")
"""


def test_tensor_cores_that_wait_for_each_instruction_are_found(tmp_path: Path) -> None:
    """By the waits of the machine code, of which there are no more than the program asked for.
    Where a program reads its last sums without waiting for them, ptxas says that it serialises
    (C7514; C7515 is another reason), and each product waits."""
    assert printed(tmp_path, WITHOUT_A_WAIT) == "False,False,False|True,True,True|"


SUMS, OTHERS = "{%r1, %r2}", "{%r3, %r4}"
FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
WAIT, WAIT_FOR_ALL_BUT_ONE = (f"wgmma.wait_group.sync.aligned {left};" for left in (0, 1))
ADD, LOAD = "add.f32 \t%r9, %r1, %r8;", "ld.shared.v2.b32 \t{%r5, %r6}, [%r7];"


def product(sums: str, first: str = "%rd1") -> str:
    return (
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {sums}, {first}, %rd2, %p1, 1, 1, 0;"
    )


@pytest.mark.parametrize(
    ("lines", "touching"),
    [
        ([FENCE, product(SUMS), COMMIT, WAIT, ADD], []),
        ([FENCE, product(SUMS), COMMIT, ADD, WAIT], [ADD]),
        ([FENCE, product(SUMS), ADD, COMMIT, WAIT], [ADD]),
        ([product(SUMS), COMMIT, product(OTHERS), COMMIT, WAIT_FOR_ALL_BUT_ONE, ADD, WAIT], []),
        ([product(OTHERS), COMMIT, product(SUMS), COMMIT, WAIT_FOR_ALL_BUT_ONE, ADD, WAIT], [ADD]),
        ([product(SUMS), product(SUMS), COMMIT, WAIT], []),
        ([product(SUMS), product("{%r2, %r3}"), COMMIT, WAIT], [product("{%r2, %r3}")]),
        ([product(OTHERS, "{%r5, %r6}"), COMMIT, LOAD, WAIT], [LOAD]),
        ([product(OTHERS, "{%r5, %r6}"), COMMIT, "mov.b32 \t%r9, %r5;", WAIT], []),
        ([product(SUMS), COMMIT, "@%p2 bra \t$after;", WAIT, "$after:", ADD], [ADD]),
        ([product(SUMS), COMMIT, "bra.uni \t$after;", ADD, "$after:", WAIT], []),
        (["$loop:", ADD, product(SUMS), COMMIT, "@%p2 bra \t$loop;", WAIT], [ADD]),
        (["$loop:", ADD, product(SUMS), COMMIT, WAIT, "@%p2 bra \t$loop;"], []),
        ([product(SUMS), COMMIT, "// add.f32 %r9, %r1, %r8;", WAIT], []),
    ],
)
def test_what_touches_sums_and_factors_in_flight(lines: list[str], touching: list[str]) -> None:
    assert touched("\n".join([*lines, "ret;"])) == touching


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_loops_that_load_nothing_ahead_are_found(tmp_path: Path, target: str) -> None:
    """Three stages are asked for in vain where what is multiplied lies where an index of the same
    turn says."""
    ids = "IDS=Pointer(torch.int32), steps=9"
    wide = f"problem(gathered, '{target}', {ids}, num_stages=3, CARRIED=carried)"
    line = f'print(*[{wide} for carried in (False, True)], sep="|")'
    assert printed(tmp_path, line) == "loads nothing ahead|"


def test_two_stages_that_load_nothing_ahead_are_found(tmp_path: Path) -> None:
    """They are asked for in vain where there is nothing to load."""
    ids = "IDS=Pointer(torch.int32), steps=9"
    narrow = f"problem(kept, 'sm80', {ids}, num_stages=2, AHEAD=ahead)"
    line = f'print(*[{narrow} for ahead in (False, True)], sep="|")'
    assert printed(tmp_path, line) == "loads nothing ahead|"


PREFILL = """
import torch
from hip_hf.backends.triton.compile import budget, catalogue

launches = catalogue.launches_of(64, torch.bfloat16, "sm90")
(launch,) = [x for x in launches if x.name == "prefill"]
row = budget.spend(launch, "sm90", 64, torch.bfloat16)
print(row.problem, row.path, row.ahead, row.uncopied, row.per_wait > 1)
"""


def test_prefill_multiplies_without_waiting_and_loads_ahead() -> None:
    done = process("-c", PREFILL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "wgmma 2 0 True"
