"""Compiles kernels for GPUs that are not there, and reads from the result what a launch would
spend."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from hip_hf.backends.triton.compile import wgmma
from hip_hf.backends.triton.compile.launch import Launch
from hip_hf.shown import said

# Shared memory that a program may have, in kilobytes.
SHARED = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99, "gfx942": 64}
KILOBYTE = 1024
# Matrix instructions by name; the first of a target's is the one that it is fast with.
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"\bv_mfma",
    "mma.sync": r"\bmma\.sync",
}
MATRIX = {"sm90": ("wgmma", "mma.sync"), "sm100": ("tcgen05", "mma.sync"), "gfx942": ("mfma",)}
MATRIX_ELSE = ("mma.sync",)
# Where the machine code of sm90 waits for its tensor cores.
WAIT = "WARPGROUP.DEPBAR"
# A product of matrices in Triton's own code for NVIDIA.
PRODUCT = r"\btt\.dot |\bttng\.(warp_group_dot|tc_gen5_mma) "
# Loads that run beside the work, in that code; from this many stages on there must be some.
COPY = r"\basync_copy_global_to_local\b|\basync_tma_(copy|gather)"
STAGES_COPIED = 2
# Fewer buffers than this may all be waited for before the next load.
STAGES_AHEAD = 3


@dataclass
class Spent:
    """What one kernel spends on one target. `shared` in bytes; `spilled` in bytes of stack a thread
    (NVIDIA) or registers (AMD); `matrix`: matrix instructions of the kind that the target is fast
    with; `path`: the fastest kind that is there. `per_wait`: instructions of sm90's tensor cores
    for each time that the program waits for them; None where there are none. `uncopied`: loops that
    multiply what no load has fetched beside the work; None where one stage was asked for, and on
    AMD. `ahead`: asynchronous loads that are left in flight while a loop multiplies, the fewest of
    all loops; None where fewer than three stages were asked for, and on AMD. `code` and `launch`:
    names for what was compiled (`Launch.code`, `Launch.digest`). `problem`: why it must not be
    released, or empty."""

    kernel: str
    target: str
    dim: int
    dtype: str
    code: str
    launch: str
    shared: int = 0
    registers: int = 0
    spilled: int = 0
    warps: int = 0
    matrix: int = 0
    path: str = ""
    per_wait: float | None = None
    uncopied: int | None = None
    ahead: int | None = None
    seconds: float = 0.0
    problem: str = ""


def gpu_target(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm")), 32)


def stand_in(name: str) -> SimpleNamespace:
    """As much of a Triton driver as compiling asks for."""
    target, index = gpu_target(name), list(SHARED).index(name)  # one cache of kernels per target
    sizes = dict(max_shared_mem=SHARED[name] * KILOBYTE, max_num_regs=65536)
    properties = sizes | dict(multiprocessor_count=1, warpSize=target.warp_size)
    return SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
        get_current_target=lambda: target,
        get_current_device=lambda: index,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Triton compiles for target `name` meanwhile."""
    driver.set_active(stand_in(name))
    try:
        yield
    finally:
        # without a GPU Triton 3.7 has no driver to go back to
        with contextlib.suppress(RuntimeError):
            driver.reset_active()


def _first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _told(tool: str, *arguments: str, binary: bytes) -> str:
    """What one of NVIDIA's tools tells of a compiled program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def serialised(ptx: str, machine_code: str) -> bool:
    """Whether the tensor cores of sm90 wait more often than they were told to: ptxas makes them
    wait after each of their instructions (it calls that C7515) where it cannot tell that nothing
    else touches the sums meanwhile."""
    return machine_code.count(WAIT) > len(re.findall(r"wgmma\.wait_group", ptx))


def product_loops(ttgir: str) -> list[str]:
    """The loops with matrix products."""
    found: list[str] = []
    # of the loops around a line: their indentation and their lines
    inside: list[tuple[str, list[str]]] = []
    for line in ttgir.splitlines():
        if inside and line.startswith(f"{inside[-1][0]}}}"):
            text = "\n".join(inside.pop()[1])
            if re.search(PRODUCT, text):
                found.append(text)
        elif re.search(r"\bscf\.for\b", line):
            inside.append((line[: len(line) - len(line.lstrip())], []))
        elif inside:
            inside[-1][1].append(line)
    return found


def in_flight(loops: Sequence[str]) -> int:
    """Asynchronous loads that are left in flight at the waits of a loop: the fewest of all
    `loops`."""
    waits = (map(int, re.findall(r"async_wait\b.*\bnum = (\d+)", text)) for text in loops)
    return min((min(counts, default=0) for counts in waits), default=0)


def spend(launch: Launch, target: str, dim: int, dtype: torch.dtype, spills: int = 0) -> Spent:
    """Compile one launch for `target`; whatever the compiler says against it becomes its `problem`,
    and if more than `spills` is spilled."""
    kind, kernel = str(dtype).removeprefix("torch."), launch.kernel
    row = Spent(launch.name, target, dim, kind, launch.code(), launch.digest())
    assert isinstance(kernel, triton.runtime.JITFunction), "compile outside the interpreter"
    start = time.perf_counter()
    try:
        with compiling_for(target):
            compiled = kernel.warmup(grid=(1,), **launch.stand_ins())
            if callable(getattr(compiled, "result", None)):
                compiled = compiled.result()
        _read(row, compiled)
        row.problem = _fault(row, launch, compiled, spills)
    except Exception as error:  # the compiler's own: it has no common type
        row.problem = said(error)
        return row
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _fault(row: Spent, launch: Launch, compiled: Any, spills: int) -> str:
    """Why the compiled launch must not be released, or nothing."""
    if row.spilled > spills:
        return f"spills {row.spilled}, allowed {spills}"
    if row.shared > SHARED[row.target] * KILOBYTE:
        return f"does not fit into {SHARED[row.target]} kilobytes of shared memory"
    if launch.tensor_cores and not row.matrix:
        return "no tensor cores"
    if row.path == "wgmma":
        machine_code = _told("nvdisasm", "-c", binary=compiled.asm["cubin"])
        row.per_wait = round(machine_code.count("HGMMA") / max(1, machine_code.count(WAIT)), 2)
        if wgmma.touched(compiled.asm["ptx"]):
            return "touches what the tensor cores work on"
        if serialised(compiled.asm["ptx"], machine_code):
            return "tensor cores wait for each instruction"
    stages = launch.arguments.get("num_stages", 1)
    if gpu_target(row.target).backend == "cuda" and stages >= STAGES_COPIED:
        loops = product_loops(compiled.asm["ttgir"])
        row.uncopied = sum(not re.search(COPY, text) for text in loops)
        if stages >= STAGES_AHEAD:
            row.ahead = in_flight(loops)
        if row.ahead == 0 or row.uncopied == len(loops):
            return "loads nothing ahead"
    return ""


def _read(row: Spent, compiled: Any) -> None:
    row.shared, row.warps = compiled.metadata.shared, compiled.metadata.num_warps
    if gpu_target(row.target).backend == "hip":
        text = compiled.asm["amdgcn"]
        row.registers = _first(r"\.vgpr_count:\s+(\d+)", text)
        row.spilled = _first(r"\.vgpr_spill_count:\s+(\d+)", text)
    else:
        text = compiled.asm["ptx"]
        usage = _told("cuobjdump", "-res-usage", binary=compiled.asm["cubin"])
        row.registers, row.spilled = _first(r"REG:(\d+)", usage), _first(r"STACK:(\d+)", usage)
    assert row.registers, "the binary says nothing of registers"
    names = MATRIX.get(row.target, MATRIX_ELSE)
    found = {name: len(re.findall(INSTRUCTIONS[name], text)) for name in names}
    row.matrix = next(iter(found.values()))
    row.path = next((name for name, count in found.items() if count), "")
