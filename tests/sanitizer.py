"""A harsher interpreter for the kernel tests (`make test-races`): what only a GPU would show, found on a CPU.

Programs of a launch run in random or in reversed order. Fresh memory and scratch hold NaN or numbers far out of range. Each
access is held to the tensor that its pointer was made from, elements between a view's rows not being part of it. Two programs
must not write different values to one place, nor one of them read what another writes; inside a program a barrier must stand
between what one thread writes and another accesses. fp32 products are those of NVIDIA's tensor cores (`tensor_cores.py`), and
integers must not wrap (`interpreter.py`).

Two things it cannot see: what is wrong at sizes that no test has, and whether kernels that wait for each other by atomics do.
"""

from __future__ import annotations

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
from poison import spoil, spoil_fresh_memory
from tensor_cores import Emulation

# Stands for whichever program: atomics may come in any order among themselves.
ATOMIC = -1
# Operations that make pointers from pointers.
POINTERS = ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "bitcast", "select", "join", "cat")


class Fault(AssertionError):
    """An access that would leave the process in an unknown state: the kernel cannot go on."""


def scratch_of(arguments: dict[str, Any]) -> tuple[str, ...]:
    """Arguments of a launch whose contents it must not expect: scores of long start levels, and decode's partial results."""
    if arguments.get("LONG"):
        return ("scratch",)
    return ("OUT", "LSE") if "Q" in arguments and arguments.get("SPLITS", 1) > 1 else ()


@dataclass(frozen=True)
class Origin:
    """The tensor that a pointer was made from: address of its first element, size of an element, and its dimensions in bytes
    from the longest stride to the shortest. `storage`: what tensors that may overlap have in common."""

    names: str
    first: int
    size: int
    dims: tuple[tuple[int, int], ...]
    storage: int

    @staticmethod
    def of(x: torch.Tensor, names: str = "") -> Origin:
        size = x.element_size()
        dims = [(length, step * size) for length, step in zip(x.shape, x.stride(), strict=True) if length != 1 and step]
        dims.sort(key=lambda dim: -dim[1])
        return Origin(names, x.data_ptr(), size, tuple(dims), x.untyped_storage().data_ptr())

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """Which of the addresses are those of its elements. Dimensions must not overlap, as no tensor of a kernel's does."""
        left = addresses - self.first
        inside = left >= 0
        for length, step in self.dims:
            index = left // step
            inside &= index < length
            left = left - index * step
        return inside & (left == 0)


@dataclass(frozen=True)
class Access:
    """Elements that one instruction of one program loads or stores. `pointers`: also of masked lanes; `values`: stored bits."""

    addresses: np.ndarray
    size: int
    program: int
    lines: Lines
    pointers: np.ndarray
    values: np.ndarray | None = None

    def meets(self, other: Access) -> bool:
        """Whether another thread may be at the same place. Tensors of the same pointers are laid out alike, so that each thread
        meets its own elements; of a scalar all threads load what one stores."""
        if self.pointers.size > 1 and np.array_equal(self.pointers, other.pointers):
            return False
        common, mine, its = np.intersect1d(self.addresses, other.addresses, return_indices=True)
        if self.values is None or other.values is None:
            return common.size > 0
        return bool((self.values[mine] != other.values[its]).any())


class Flat:
    """Accesses to one storage, place by place, a place being as large as the smallest element."""

    def __init__(self, accesses: list[Access], size: int) -> None:
        self.accesses = accesses
        steps = [(a.addresses[:, None] + np.arange(0, a.size, size)).ravel() for a in accesses]
        self.which = np.repeat(np.arange(len(accesses)), [len(places) for places in steps])
        self.places = np.concatenate(steps)
        self.programs = np.array([a.program for a in accesses])[self.which]
        if accesses[0].values is not None:
            self.values = np.concatenate([np.ascontiguousarray(a.values).view(f"u{size}") for a in accesses])

    def sort(self) -> Flat:
        order = np.argsort(self.places, kind="stable")
        for name in ("which", "places", "programs", "values"):
            setattr(self, name, getattr(self, name)[order])
        return self


class Sanitizer:
    """While it is entered, kernels run so. `found`: each fault once, the first time that it was met."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.found: dict[Any, str] = {}
        self.launches = 0

    def __enter__(self) -> Sanitizer:
        self.patch = pytest.MonkeyPatch()
        spoil_fresh_memory(self.patch)
        Emulation.start(self.patch)
        executor, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt

        def launched(grid: Any, *args: Any, **kwargs: Any) -> None:
            self._begin({**dict(zip(grid.arg_names, args, strict=False)), **kwargs})
            executor(grid, *args, **kwargs)
            self._compare_programs()

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
        self.launches += 1
        self.names: dict[int, list[str]] = defaultdict(list)
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor):
                self.names[x.data_ptr()].append(name)
        for name in scratch_of(arguments):
            spoil(arguments[name])
        self.loads: dict[int, list[Access]] = defaultdict(list)
        self.stores: dict[int, list[Access]] = defaultdict(list)

    # order of programs

    def _set_grid_dim(self, original: Any, builder: Any, *shape: int) -> None:
        original(builder, *shape)
        self.programs = [tuple(map(int, at)) for at in np.ndindex(shape)]
        self.order = list(reversed(self.programs))
        if self.random.random() < 0.5:
            self.random.shuffle(self.order)
        self.next = iter(range(len(self.order)))

    def _set_grid_idx(self, original: Any, builder: Any, *_: int) -> None:
        self.program = next(self.next)
        original(builder, *self.order[self.program])
        self._barrier(None)

    def _barrier(self, original: Any, *builder: Any) -> None:
        """What this program accessed since the last one, by storage."""
        self.loaded: dict[int, list[Access]] = defaultdict(list)
        self.stored: dict[int, list[Access]] = defaultdict(list)

    # origins of pointers

    @staticmethod
    def _carry(original: Any, builder: Any, *args: Any) -> Any:
        made = original(builder, *args)
        handles = [x for x in args if isinstance(x, TensorHandle)]
        origins = tuple(dict.fromkeys(origin for x in handles for origin in x.attr.get("origins", ())))
        if origins:
            made.attr["origins"] = origins
        return made

    @staticmethod
    def _materialize(original: Any, pointer: Any, *args: Any) -> Any:
        made, masks = original(pointer, *args)
        made.attr["origins"] = pointer.base.attr["origins"]
        return made, masks

    # accesses

    def _masked_load(self, original: Any, builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        storage, access = self._access("load", pointers, mask)
        self._compare_threads("loads what another thread stored", access, self.stored[storage])
        self.loaded[storage].append(access)
        self.loads[storage].append(access)
        return original(builder, pointers, mask, *rest, **named)

    def _masked_store(self, original: Any, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        storage, access = self._access("store", pointers, mask, value)
        self._compare_threads("stores over what another thread loads", access, self.loaded[storage])
        self._compare_threads("stores over what another thread stored", access, self.stored[storage])
        order = np.argsort(access.addresses, kind="stable")
        places, values = access.addresses[order], access.values[order]
        if ((places[1:] == places[:-1]) & (values[1:] != values[:-1])).any():
            self._note("one store writes two values to one place", access)
        self.stored[storage].append(access)
        self.stores[storage].append(access)
        return original(builder, pointers, value, mask, *rest, **named)

    def _atomic_rmw(self, original: Any, builder: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        storage, access = self._access("atomic", pointers, mask, value)
        self.stores[storage].append(access)
        return original(builder, kind, pointers, value, mask, *rest)

    def _atomic_cas(self, original: Any, builder: Any, pointers: Any, compared: Any, value: Any, *rest: Any) -> Any:
        storage, access = self._access("atomic", pointers, TensorHandle(np.ones(1, bool), compared.dtype), value)
        self.stores[storage].append(access)
        return original(builder, pointers, compared, value, *rest)

    def _access(self, kind: str, pointers: Any, mask: Any, value: Any = None) -> tuple[int, Access]:
        """The storage, and what is accessed of it; raises if any of that is outside of the pointer's tensor."""
        shape = pointers.data.shape
        chosen = np.broadcast_to(np.asarray(mask.data, bool), shape)
        addresses = pointers.data[chosen].view(np.int64)
        origins = pointers.attr.get("origins", ())
        if not origins:
            raise Fault(f"{kind} through a pointer of unknown origin: {self._place(lines())}")
        size = origins[0].size
        outside = ~np.logical_or.reduce([origin.holds(addresses) for origin in origins])
        if outside.any():
            origin = origins[0]
            element = (int(addresses[outside][0]) - origin.first) / size
            lengths = " ".join(f"{length} (step {step // size})" for length, step in origin.dims) or "1"
            what = f"{kind} out of range: element {element:g} of {origin.names}, which has dimensions {lengths}"
            text = f"{what}: {self._place(lines())}"
            self.found.setdefault((kind, lines()), text)
            raise Fault(text)
        values = None
        if value is not None:
            bits = np.ascontiguousarray(np.broadcast_to(value.data, shape)[chosen])
            values = bits.view(f"u{size}") if bits.itemsize == size else bits.astype(f"u{size}")
        program = ATOMIC if kind == "atomic" else self.program
        return origins[0].storage, Access(addresses, size, program, lines(), pointers.data, values)

    # what is wrong

    def _compare_threads(self, what: str, access: Access, before: list[Access]) -> None:
        for other in before:
            if access.meets(other):
                self._note(f"{what} with no barrier between", access, other)

    def _compare_programs(self) -> None:
        for storage, stored in self.stores.items():
            loaded = self.loads[storage]
            size = min(access.size for access in [*stored, *loaded])
            stores = Flat(stored, size).sort()
            starts = np.flatnonzero(np.diff(stores.places, prepend=-1))
            if not starts.size:
                continue
            lowest, highest = (f.reduceat(stores.programs, starts) for f in (np.minimum, np.maximum))
            differ = np.minimum.reduceat(stores.values, starts) != np.maximum.reduceat(stores.values, starts)
            for at in np.flatnonzero((lowest != highest) & (differ | (lowest == ATOMIC)))[:1]:
                group = slice(starts[at], None)
                one = int(stores.which[group][0])
                other = int(stores.which[group][np.argmax(stores.programs[group] != stores.programs[group][0])])
                self._note("two programs write different values to one place", stored[one], stored[other])
            if loaded:
                loads, places = Flat(loaded, size), stores.places[starts]
                index = np.minimum(np.searchsorted(places, loads.places), len(places) - 1)
                others = (lowest[index] != loads.programs) | (highest[index] != loads.programs)
                for at in np.flatnonzero((places[index] == loads.places) & others)[:1]:
                    group = slice(starts[index[at]], None)
                    other = int(stores.which[group][np.argmax(stores.programs[group] != loads.programs[at])])
                    self._note("a program reads what another writes", loaded[int(loads.which[at])], stored[other])

    def _place(self, at: Lines, program: int | None = None) -> str:
        index = self.program if program is None else program
        return described(at, self.order[index]) if index != ATOMIC else described(at, ("any",)) + " (atomic)"

    def _note(self, what: str, *accesses: Access) -> None:
        places = [self._place(access.lines, access.program) for access in accesses]
        self.found.setdefault((what, *(access.lines for access in accesses)), f"{what}: {'; and '.join(places)}")


class Plugin:
    """Runs each test under a sanitizer, whose seed depends on the run's and on the test's name: alone it runs as with others."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.launches = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Iterator[None]:
        with Sanitizer(self.seed + zlib.crc32(pyfuncitem.nodeid.encode())) as sanitizer:
            result = yield
        if sanitizer.found:
            pytest.fail("\n".join(sanitizer.found.values()), pytrace=False)
        return result
