"""One compilation of a kernel, which `hip-hf kernels` makes for every GPU without having one and
`benchmarks/tune.py` times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import MockTensor

from hip_hf.backends.triton.compile.digest import code_digest, name_of


@dataclass(frozen=True)
class Launch:
    """One compilation: `kernel` (a `triton.jit` function) with `arguments` by name, as at its
    launch: tensors or `MockTensor`s, which are aligned to 16 bytes as those of torch's allocator;
    numbers as they are (divisibility by 16 is specialised), constexprs, `num_warps`, `num_stages`.

    `tensor_cores`: whether it must use matrix instructions. `grid`: where it can be launched as
    well.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    tensor_cores: bool = False
    grid: tuple[int, ...] | None = None

    def stand_ins(self) -> dict[str, Any]:
        """The arguments with `MockTensor`s for tensors."""
        return {
            name: MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x
            for name, x in self.arguments.items()
        }

    def given(self) -> dict[str, Any]:
        """What the compiler is given beside the code, in JSON's types: numbers, launch options, and
        of tensors the dtype. Arguments of the kernel by their place: their names do not count."""
        places = {name: str(place) for place, name in enumerate(self.kernel.arg_names)}
        return {
            places.get(name, name): x if isinstance(x, int | float | str) else str(x.dtype)
            for name, x in self.arguments.items()
        }

    def digest(self) -> str:
        """A name for what is `given`."""
        return name_of(json.dumps(self.given(), sort_keys=True))

    def code(self) -> str:
        """A name for the code. Where it is the same, and so is what is `given`, so is the
        program."""
        return code_digest(self.kernel)
