"""A harsher interpreter for the kernel tests (`make test-races`): what only a GPU would show, found
on a CPU.

Programs of a launch run in random or in reversed order. Fresh memory, and what a launch must not
expect of earlier ones (`stale.py`), hold NaN or numbers far out of range. Each access is held to
the tensor that its pointer was made from, elements between a view's rows not being part of it. Two
programs must not write different values to one place, nor one of them read what another writes;
inside a program a barrier must stand between what one thread writes and another accesses. fp32
products are those of NVIDIA's tensor cores (`tensor_cores.py`), and integers must not wrap
(`interpreter.py`).

What it cannot see: whether kernels that wait for each other by atomics do, and what is wrong at
sizes that no test has. Offsets at real sizes are those of `test_real_sizes.py`.
"""

from __future__ import annotations

import ctypes
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import Builder, Lines, TensorHandle, described, interpreter, lines
from poison import spoil_fresh_memory
from stale import spoil_stale
from tensor_cores import Emulation
from vast import zeros

# Stands for whichever program: atomics may come in any order among themselves.
ATOMIC = -1
# Operations that make pointers from pointers.
POINTERS = (
    "addptr",
    "splat",
    "unsplat",
    "broadcast",
    "expand_dims",
    "reshape",
    "trans",
    "bitcast",
    "select",
    "join",
    "cat",
)


class Fault(AssertionError):
    """An access that would leave the process in an unknown state: the kernel cannot go on."""


def last_of(grid: tuple[int, ...], blocks: int) -> list[tuple[int, ...]]:
    """The last program of a grid, whose offsets are the largest, and of its last `blocks` the one
    that comes first: it works at the end of the last sequence (`place_of`)."""
    ends = [length - 1 for length in grid]
    return list(
        dict.fromkeys(
            [tuple(ends), (max(0, grid[0] - blocks), *ends[1:])] if blocks else [tuple(ends)]
        )
    )


@dataclass(frozen=True)
class Origin:
    """The tensor that a pointer was made from: address of its first element, size of an element,
    and its dimensions in bytes from the longest stride to the shortest. `storage`: what tensors
    that may overlap have in common."""

    names: str
    first: int
    size: int
    dims: tuple[tuple[int, int], ...]
    storage: int

    @staticmethod
    def of(x: torch.Tensor, names: str = "") -> Origin:
        size = x.element_size()
        dims = [
            (length, step * size)
            for length, step in zip(x.shape, x.stride(), strict=True)
            if length != 1 and step
        ]
        dims.sort(key=lambda dim: -dim[1])
        for i in range(len(dims) - 1, 0, -1):  # two that follow each other without a gap are one
            (outer, long), (inner, short) = dims[i - 1 : i + 1]
            if long == inner * short:
                dims[i - 1 : i + 1] = [(outer * inner, short)]
        return Origin(names, x.data_ptr(), size, tuple(dims), x.untyped_storage().data_ptr())

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """Which of the addresses are those of its elements. Dimensions must not overlap, as no
        tensor of a kernel's does."""
        left = addresses - self.first
        inside = left >= 0
        for length, step in self.dims:
            index = left // step
            inside &= index < length
            left = left - index * step
        return inside & (left == 0)


@dataclass(frozen=True)
class Access:
    """What one instruction of one program loads or stores."""

    program: int
    lines: Lines


class Shadow:
    """What a launch did to each place of one storage; a place is as large as the smallest element.
    Numbers are those of accesses, 0: none. `stored`: the last that stored; `loaded`: the last that
    loaded, `mixed`: where that was not by the same pointers as before; `readers`: the program that
    loads, from 1 on, or `SEVERAL`."""

    SEVERAL = np.iinfo(np.int32).max

    def __init__(self, x: torch.Tensor, size: int) -> None:
        storage = x.untyped_storage()
        self.first, self.size = storage.data_ptr(), size
        count = storage.nbytes() // size
        self.memory = np.frombuffer(
            (ctypes.c_uint8 * (count * size)).from_address(self.first), f"u{size}"
        )
        self.stored, self.loaded, self.mixed, self.readers = (
            zeros(count, np.int32) for _ in range(4)
        )

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The places of elements at the addresses."""
        first = (addresses - self.first) // self.size
        return (
            first if size == self.size else (first[:, None] + np.arange(size // self.size)).ravel()
        )


class Sanitizer:
    """While it is entered, kernels run so. `found`: each fault once, the first time that it was
    met."""

    def __init__(self, seed: int, last: bool = False) -> None:
        """`last`: of each launch only those programs whose offsets are the largest (`last_of`);
        memory is left as it is."""
        self.random = random.Random(seed)
        self.last = last
        self.found: dict[Any, str] = {}

    def __enter__(self) -> Sanitizer:
        self.patch = pytest.MonkeyPatch()
        if not self.last:
            spoil_fresh_memory(self.patch)
        Emulation.start(self.patch)
        executor, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt

        def launched(grid: Any, *args: Any, **kwargs: Any) -> None:
            arguments = {**dict(zip(grid.arg_names, args, strict=False)), **kwargs}
            self._begin(arguments)
            if not self.last:
                spoil_stale(grid.fn.__name__, arguments)
            else:
                self.grid = (*grid.grid, 1, 1)[:3]
                self.programs = last_of(self.grid, arguments.get("blocks", 0))
                grid.grid = (len(self.programs),)
            executor(grid, *args, **kwargs)

        def converted(x: Any) -> Any:
            made = convert(x)
            if isinstance(x, torch.Tensor):
                made.handle.attr["origins"] = (Origin.of(x, " or ".join(self.names[x.data_ptr()])),)
            return made

        self.patch.setattr(interpreter.GridExecutor, "__call__", launched)
        self.patch.setattr(interpreter, "_implicit_cvt", converted)
        for name in POINTERS:
            self._wrap(Builder, f"create_{name}", self._carry)
        for kind in ("BlockPointerHandle", "TensorDescHandle"):
            if hasattr(interpreter, kind):
                self._wrap(getattr(interpreter, kind), "materialize_pointers", self._materialize)
        for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas", "barrier"):
            self._wrap(Builder, f"create_{name}", getattr(self, f"_{name}"))
        for name in ("set_grid_dim", "set_grid_idx"):
            self._wrap(Builder, name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.undo()

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        self.patch.setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    def _begin(self, arguments: dict[str, Any]) -> None:
        self.names: dict[int, list[str]] = defaultdict(list)
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor):
                self.names[x.data_ptr()].append(name)
        tensors: dict[int, list[torch.Tensor]] = defaultdict(list)
        for x in arguments.values():
            if isinstance(x, torch.Tensor) and x.numel():
                tensors[x.untyped_storage().data_ptr()].append(x)
        self.shadows = {
            at: Shadow(xs[0], min(x.element_size() for x in xs)) for at, xs in tensors.items()
        }
        self.accesses = [Access(0, ())]  # their numbers begin with 1
        self.programs_of = np.zeros(1024, np.int32)  # by the number of an access

    # order of programs

    def _set_grid_dim(self, original: Any, builder: Any, *shape: int) -> None:
        if self.last:
            shape = self.grid
        else:
            self.programs = [tuple(map(int, at)) for at in np.ndindex(shape)]
        original(builder, *shape)
        self.order = list(reversed(self.programs))
        if self.random.random() < 0.5:
            self.random.shuffle(self.order)
        self.next = iter(range(len(self.order)))

    def _set_grid_idx(self, original: Any, builder: Any, *_: int) -> None:
        self.program = next(self.next)
        original(builder, *self.order[self.program])
        self._barrier()

    def _barrier(self, *_: Any) -> None:
        """What was accessed up to here is done; of later accesses, the pointers are kept by
        number."""
        self.done = len(self.accesses) - 1
        self.pointers: dict[int, np.ndarray] = {}

    # origins of pointers

    @staticmethod
    def _carry(original: Any, builder: Any, *args: Any) -> Any:
        made = original(builder, *args)
        handles = [x for x in args if isinstance(x, TensorHandle)]
        origins = tuple(
            dict.fromkeys(origin for x in handles for origin in x.attr.get("origins", ()))
        )
        if origins:
            made.attr["origins"] = origins
        return made

    @staticmethod
    def _materialize(original: Any, pointer: Any, *args: Any) -> Any:
        made, masks = original(pointer, *args)
        made.attr["origins"] = pointer.base.attr["origins"]
        return made, masks

    # accesses

    def _masked_load(
        self, original: Any, builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        shadow, places, _ = self._access("load", pointers, mask)
        number, before, recent = (
            len(self.accesses) - 1,
            shadow.stored[places],
            shadow.loaded[places],
        )
        self._compare_programs("a program reads what another writes", before, before > 0)
        self._compare_threads("loads what another thread stored", before)
        for other in np.unique(recent[recent > self.done]):
            if self._differ(other):
                shadow.mixed[places[recent == other]] = number
        shadow.loaded[places] = number
        readers = shadow.readers[places]
        own = self.program + 1
        shadow.readers[places] = np.where((readers == 0) | (readers == own), own, Shadow.SEVERAL)
        return original(builder, pointers, mask, *rest, **named)

    def _masked_store(
        self,
        original: Any,
        builder: Any,
        pointers: Any,
        value: Any,
        mask: Any,
        *rest: Any,
        **named: Any,
    ) -> Any:
        shadow, places, values = self._access("store", pointers, mask, value)
        self._store(shadow, places, shadow.memory[places] != values)
        order = np.argsort(places, kind="stable")
        at, bits = places[order], values[order]
        if ((at[1:] == at[:-1]) & (bits[1:] != bits[:-1])).any():
            self._note("one store writes two values to one place", len(self.accesses) - 1)
        before, mixed = shadow.loaded[places], shadow.mixed[places]
        self._compare_threads("stores over what another thread loads", before)
        for other in np.unique(mixed[mixed > self.done])[:1]:
            self._note(
                "stores over what another thread loads with no barrier between",
                len(self.accesses) - 1,
                other,
            )
        return original(builder, pointers, value, mask, *rest, **named)

    def _atomic_rmw(
        self,
        original: Any,
        builder: Any,
        kind: Any,
        pointers: Any,
        value: Any,
        mask: Any,
        *rest: Any,
    ) -> Any:
        shadow, places, _ = self._access("atomic", pointers, mask, value)
        self._store(shadow, places, np.ones(places.shape, bool))
        return original(builder, kind, pointers, value, mask, *rest)

    def _atomic_cas(
        self, original: Any, builder: Any, pointers: Any, compared: Any, value: Any, *rest: Any
    ) -> Any:
        shadow, places, _ = self._access(
            "atomic", pointers, TensorHandle(np.ones(1, bool), compared.dtype), value
        )
        self._store(shadow, places, np.ones(places.shape, bool))
        return original(builder, pointers, compared, value, *rest)

    def _store(self, shadow: Shadow, places: np.ndarray, changes: np.ndarray) -> None:
        """`changes`: where the value is not the one that is there."""
        before, readers = shadow.stored[places], shadow.readers[places]
        atomic = self.programs_of[before] == ATOMIC
        self._compare_programs(
            "two programs write different values to one place",
            before,
            (before > 0) & (changes | atomic),
        )
        self._compare_threads(
            "stores over what another thread stored", np.where(changes, before, 0)
        )
        others = (readers != 0) & (readers != self.accesses[-1].program + 1)
        for other in shadow.loaded[places[others]][:1]:
            self._note("a program reads what another writes", int(other), len(self.accesses) - 1)
        shadow.stored[places] = len(self.accesses) - 1

    def _access(
        self, kind: str, pointers: Any, mask: Any, value: Any = None
    ) -> tuple[Shadow, np.ndarray, Any]:
        """The storage and the places in it that are accessed, and the bits to be stored, place by
        place; raises if an address is outside of the pointer's tensor."""
        shape, at = pointers.data.shape, lines()
        chosen = np.broadcast_to(np.asarray(mask.data, bool), shape)
        addresses = pointers.data[chosen].view(np.int64)
        origins = pointers.attr.get("origins", ())
        if not origins:
            raise Fault(f"{kind} through a pointer of unknown origin: {self._place(at)}")
        size = origins[0].size
        outside = ~np.logical_or.reduce([origin.holds(addresses) for origin in origins])
        if outside.any():
            origin = origins[0]
            element = (int(addresses[outside][0]) - origin.first) / size
            lengths = (
                " ".join(f"{length} (step {step // size})" for length, step in origin.dims) or "1"
            )
            what = f"element {element:g} of {origin.names}, which has dimensions {lengths}"
            text = f"{kind} out of range: {what}: {self._place(at)}"
            self.found.setdefault((kind, at), text)
            raise Fault(text)
        number = len(self.accesses)
        self.accesses.append(Access(ATOMIC if kind == "atomic" else self.program, at))
        if number == len(self.programs_of):
            self.programs_of = np.concatenate([self.programs_of, np.zeros_like(self.programs_of)])
        self.programs_of[number] = self.accesses[-1].program
        self.pointers[number] = pointers.data
        shadow, values = self.shadows[origins[0].storage], None
        if value is not None:
            bits = np.ascontiguousarray(np.broadcast_to(value.data, shape)[chosen])
            values = (bits if bits.itemsize == size else bits.astype(f"u{size}")).view(
                f"u{shadow.size}"
            )
        return shadow, shadow.places(addresses, size), values

    # what is wrong with the last one

    def _differ(self, other: int) -> bool:
        """Whether another thread may be at a place that both access. Tensors of the same pointers
        are laid out alike: each thread meets its own elements. Of a scalar all threads load what
        one stores."""
        mine, its = self.pointers[len(self.accesses) - 1], self.pointers[other]
        return mine.size == 1 or not np.array_equal(mine, its)

    def _compare_threads(self, what: str, before: np.ndarray) -> None:
        for other in np.unique(before[before > self.done]):
            if self._differ(other):
                self._note(f"{what} with no barrier between", len(self.accesses) - 1, other)

    def _compare_programs(self, what: str, before: np.ndarray, which: np.ndarray) -> None:
        for other in before[which & (self.programs_of[before] != self.accesses[-1].program)][:1]:
            self._note(what, len(self.accesses) - 1, other)

    def _place(self, at: Lines, program: int | None = None) -> str:
        index = self.program if program is None else program
        return (
            described(at, self.order[index])
            if index != ATOMIC
            else described(at, ("any",)) + " (atomic)"
        )

    def _note(self, what: str, *numbers: int) -> None:
        accesses = [self.accesses[number] for number in numbers]
        places = [self._place(access.lines, access.program) for access in accesses]
        self.found.setdefault(
            (what, *(access.lines for access in accesses)), f"{what}: {'; and '.join(places)}"
        )


class Plugin:
    """Runs each test under a sanitizer, whose seed depends on the run's and on the test's name:
    alone it runs as with others."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Iterator[None]:
        with Sanitizer(self.seed + zlib.crc32(pyfuncitem.nodeid.encode())) as sanitizer:
            result = yield
        if sanitizer.found:
            pytest.fail("\n".join(sanitizer.found.values()), pytrace=False)
        return result
