"""The harsher interpreter finds each kind of fault in a small wrong kernel, and nothing in the
right one beside it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from interpreter import DEVICE, interpreter
from poison import FAR
from sanitizer import Sanitizer

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="it is the interpreter that is made harsher"
)


def found(kernel: Any, *args: Any, grid: tuple[int, ...] = (2,), **fields: Any) -> str:
    """What the sanitizer says of a launch, whether the kernel can go on or not."""
    with Sanitizer(0) as sanitizer:
        try:
            kernel[grid](*args, **fields)
        except interpreter.InterpreterError as error:
            return str(error)
    return "\n".join(sanitizer.found.values())


@triton.jit
def copy_rows(x, out, stride, columns, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    mask = column < columns if MASKED else column < WIDTH
    tl.store(out + row * WIDTH + column, tl.load(x + row * stride + column, mask=mask, other=0.0))


@pytest.mark.parametrize("masked", [True, False])
def test_between_the_rows_of_a_view(masked: bool) -> None:
    """Elements 5 to 7 of a row are memory of the same allocation, but no part of what the kernel
    was given."""
    x, out = torch.randn(2, 8)[:, :5], torch.zeros(2, 8)
    said = found(copy_rows, x, out, x.stride(0), 5, 8, masked)
    if masked:
        assert said == ""
        assert torch.equal(out[:, :5], x)
    else:
        assert "load out of range: element" in said
        assert " of x, which has dimensions 2 (step 8) 5 (step 1)" in said
        assert re.search(
            r"program \([01], 0, 0\) of copy_rows, test_sanitizer.py:\d+ copy_rows", said
        )


@pytest.mark.parametrize("kind", ["load", "store", "atomic"])
def test_out_of_range(kind: str) -> None:
    """Also where the memory behind a tensor is another one's, into which the process may well read
    and write."""
    both = torch.zeros(32)
    x, behind = both[:16], both[16:]
    said = found(out_of_range, x, behind, {"load": 0, "store": 1, "atomic": 2}[kind], 16)
    assert said == ""
    said = found(out_of_range, x, behind, {"load": 0, "store": 1, "atomic": 2}[kind], 17)
    assert f"{kind} out of range: element 16 of x" in said
    assert (behind == 0).all()


@triton.jit
def out_of_range(x, behind, KIND: tl.constexpr, COUNT: tl.constexpr):
    inside = tl.arange(0, 32) < COUNT
    at = x + tl.arange(0, 32)
    if KIND == 0:
        tl.load(at, mask=inside)
    elif KIND == 1:
        tl.store(at, 1.0, mask=inside)
    else:
        tl.atomic_add(at, 1.0, mask=inside)


@triton.jit
def write_one_place(out, SAME: tl.constexpr):
    tl.store(out, 7 if SAME else tl.program_id(0))


@triton.jit
def read_a_neighbour(x, OWN: tl.constexpr):
    program = tl.program_id(0)
    value = tl.load(x + (program if OWN else (program + 1) % 2))
    tl.debug_barrier()
    tl.store(x + program, value + 1)


@triton.jit
def count_programs(x, ATOMIC: tl.constexpr):
    if ATOMIC or tl.program_id(0) == 0:
        tl.atomic_add(x, 1)
    else:
        tl.store(x, 1)


@triton.jit
def shift(x, BARRIER: tl.constexpr):
    at = tl.arange(0, 16)
    value = tl.load(x + 1 + at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + at, value)


@triton.jit
def through_memory(x, out, BARRIER: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(x + at, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + at, tl.load(x + 15 - at))


@triton.jit
def store_twice(x, BARRIER: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(x + at, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + 15 - at, at)


@triton.jit
def all_to_one_place(x, SAME: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(x + at * 0, at * (0 if SAME else 1))


@triton.jit
def far_away(x, strides, WIDE: tl.constexpr):
    row = tl.program_id(0) + tl.load(strides)
    stride = tl.load(strides + 1)
    at = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(x + at - at, 1)


def numbers(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


@pytest.mark.parametrize(
    ("kernel", "args", "grid", "said"),
    [
        (write_one_place, (numbers(1),), 2, "two programs write different values to one place"),
        (count_programs, (numbers(1),), 2, "two programs write different values to one place"),
        (read_a_neighbour, (numbers(2),), 2, "a program reads what another writes"),
        (shift, (numbers(17),), 1, "stores over what another thread loads with no barrier between"),
        (
            through_memory,
            (numbers(16), numbers(16)),
            1,
            "loads what another thread stored with no barrier between",
        ),
        (
            store_twice,
            (numbers(16),),
            1,
            "stores over what another thread stored with no barrier between",
        ),
        (all_to_one_place, (numbers(1),), 1, "one store writes two values to one place"),
        (
            far_away,
            (numbers(1), torch.tensor([2**16, 2**15], dtype=torch.int32)),
            1,
            "int32 overflow: multiply",
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_right_and_wrong(kernel: Any, args: tuple[Any, ...], grid: int, said: str) -> None:
    assert found(kernel, *args, True, grid=(grid,)) == ""
    report = found(kernel, *args, False, grid=(grid,))
    assert said in report
    name = kernel.fn.__name__
    assert re.search(rf"program \(\d, 0, 0\) of {name}, test_sanitizer.py:\d+ {name}", report), (
        report
    )


@triton.jit
def note_order(out, counter):
    tl.store(out + tl.program_id(0), tl.atomic_add(counter, 1))


def test_programs_run_in_random_and_in_reversed_order() -> None:
    orders = set()
    for seed in range(8):
        out, counter = numbers(4), numbers(1)
        with Sanitizer(seed) as sanitizer:
            note_order[(4,)](out, counter)
        assert not sanitizer.found
        assert sorted(out.tolist()) == [0, 1, 2, 3], "each program runs once"
        orders.add(tuple(out.tolist()))
    assert (3, 2, 1, 0) in orders
    assert len(orders) > 2
    assert (0, 1, 2, 3) not in orders, "a seed that draws it proves nothing"


def test_fresh_memory_is_spoilt_once_and_scratch_before_each_launch() -> None:
    scratch, out = torch.zeros(4), numbers(1)
    with Sanitizer(0):
        assert torch.empty(3).isnan().all()
        assert (torch.empty_like(numbers(3)) == FAR).all()
        for _ in range(2):
            scratch.zero_()
            keep_scratch[(1,)](scratch, out, START_LEVEL_IN_MEMORY=True)
            assert scratch.isnan().all()


@triton.jit
def keep_scratch(scratch, out, START_LEVEL_IN_MEMORY: tl.constexpr):
    tl.store(out, 1)


@triton.jit
def select_kernel(
    sequences,
    indices,
    counts,
    windows,
    made,
    refresh,
    first_program,
    LOOKS: tl.constexpr,
    STATEFUL: tl.constexpr,
):
    """Which forgets to select."""


@pytest.mark.parametrize("stateful", [True, False])
def test_selections_of_earlier_launches_are_spoilt_where_they_are_made_anew(stateful: bool) -> None:
    """Of five sequences at position 9: kept, too old, made for a later position, after a step of
    two rows, and made just now."""
    made = torch.tensor([7, 5, 10, 9, 9], dtype=torch.int32).view(5, 1, 1)
    sequences = torch.tensor(
        [[0] * 5, [0] * 5, [0] * 5, [1, 1, 1, 2, 1], [9] * 5], dtype=torch.int32
    )
    counts, windows, indices = (
        torch.ones(5, 1, 1).int(),
        torch.ones(5, 1, 1).int(),
        torch.ones(5, 1, 1, 2).int(),
    )
    with Sanitizer(0):
        select_kernel[(5,)](
            sequences, indices, counts, windows, made, 4, 0, LOOKS=1, STATEFUL=stateful
        )
    kept = [True, False, False, False, True] if stateful else [False] * 5
    for x in (counts, windows, indices):
        assert (x.view(5, -1)[:, 0] == 1).tolist() == kept
        assert ((x == 1) | (x == FAR)).all()


@triton.jit
def append_kernel(table, states, built, BUILD: tl.constexpr, LEVELS: tl.constexpr):
    """Which forgets to build."""


@pytest.mark.parametrize("build", [True, False])
def test_summaries_of_chunks_that_are_not_built_are_spoilt(build: bool) -> None:
    """Of five blocks, in tiles of two: blocks, pairs, a four, and of the roots that of the first
    two tiles, and their parent's. A launch that only merges finds what tiles were built by the one
    before."""
    table, states, built = (
        torch.zeros(1, 1, 16, 3),
        torch.zeros(1, 1, 8, 2),
        torch.tensor([[5]], dtype=torch.int32),
    )
    with Sanitizer(0):
        append_kernel[(1,)](table, states, built, BUILD=build, LEVELS=1)
    if not build:
        assert not table.isnan().any()
        assert not states.isnan().any()
        return
    blocks, pairs, fours = [0, 2, 4, 6, 8], [1, 5], [3]
    assert (~table[0, 0].isnan().any(1)).nonzero().flatten().tolist() == sorted(
        [*blocks, *pairs, *fours]
    )
    assert (~states[0, 0].isnan().any(1)).nonzero().flatten().tolist() == [0, 1, 2]
