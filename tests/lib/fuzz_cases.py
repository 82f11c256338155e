"""What the fuzzing draws, tensors of any strides and settings of any method, and what is right:
plain attention in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import causal, eager, read_mask
from hypothesis import settings
from hypothesis import strategies as st

from hip_hf.config import REPRESENTATIVES, SCORES, VOTES, HiPConfig
from hip_hf.geometry import BlockMask
from hip_hf.methods.base import method_of, selects
from hip_hf.problem import DTYPES
from hip_hf.registry import METHODS

# How far a result in each dtype may be from float64: values are of size 1, and rounding the output
# alone gives half a unit of it.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
COVERS = 256  # a budget larger than any context here

Draw = Callable[[st.SearchStrategy[Any]], Any]


def cases(share: float) -> Any:
    """Settings of a property that gets so much of all the cases of the profile."""
    count = max(1, round(share * settings.default.max_examples))
    return settings(max_examples=count)


def refused(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, or None and what its ValueError says."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """As layers of models lay it out."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def dims_apart(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x + 1], dim=-1)[..., 0]


def inside(x: torch.Tensor) -> torch.Tensor:
    """A part of a larger tensor that holds NaN elsewhere."""
    larger = torch.full([n + 2 for n in x.shape], torch.nan, dtype=x.dtype)
    part = larger[tuple(slice(1, 1 + n) for n in x.shape)]
    part.copy_(x)
    return part


def expanded(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """All alike along a dimension, whose stride is 0."""
    return lambda x: x.narrow(dim, 0, 1).expand_as(x)


LAYOUTS = (contiguous, tokens_first, dims_apart, inside, *(expanded(dim) for dim in range(4)))


@dataclass
class Shape:
    """Of a call: sizes of its tensors, where its rows begin, and what else attention takes."""

    batch: int
    heads: int
    groups: int
    tokens: int
    rows: int
    dim: int
    dv: int
    dtype: torch.dtype
    key_start: list[int] | None
    q_start: list[int] | None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def sliding(self) -> int | None:
        return self.more.get("sliding_window")

    def visible(self) -> torch.Tensor:
        """The keys in sight of each row."""
        return causal(
            self.batch, self.rows, self.tokens, self.key_start, self.q_start, self.sliding
        )


@st.composite
def shapes(draw: Draw, most: int = 120) -> Shape:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, most))
    rows = min(tokens, draw(st.sampled_from([1, 2, 16, 17, 40, most])))
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    starts: list[list[int] | None] = [None, None]
    for i, highest in enumerate((tokens, tokens - rows)):
        if draw(st.booleans()):
            starts[i] = [draw(st.integers(0, highest)) for _ in range(batch)]
    more: dict[str, Any] = {}
    what = draw(st.integers(0, 15))
    if what & 3 == 3:
        more["sliding_window"] = draw(st.integers(1, most))
    if what & 4:
        more["softcap"] = draw(st.sampled_from([0.5, 30.0]))
    if what & 8:
        more["sinks"] = torch.linspace(-2, 2, heads * groups)
    if what == 1:
        more["scale"] = 0.3
    dim, dv = draw(st.sampled_from([(1, 1), (4, 4), (8, 3), (6, 8)]))
    return Shape(
        batch, heads, groups, tokens, rows, dim, dv, draw(st.sampled_from(DTYPES)), *starts, more
    )


@dataclass
class Tensors:
    """q, k and v of a shape: how they are made."""

    shape: Shape
    seed: int
    layouts: list[Callable[[torch.Tensor], torch.Tensor]]

    def make(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape, made = self.shape, []
        each = (
            (shape.heads * shape.groups, shape.rows, shape.dim),
            (shape.heads, shape.tokens, shape.dim),
        )
        for size, layout in zip((*each, (*each[1][:2], shape.dv)), self.layouts, strict=True):
            made.append(
                layout(torch.randn(shape.batch, *size, generator=generator).to(shape.dtype))
            )
        return made[0], made[1], made[2]


@st.composite
def tensors(draw: Draw, shape: Shape) -> Tensors:
    """In layouts of any kind."""
    plain = draw(st.booleans())
    layouts = [contiguous if plain else draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    return Tensors(shape, draw(st.integers(0, 2**16)), layouts)


def tensor_arguments(shape: Shape) -> dict[str, Any]:
    starts = {name: getattr(shape, name) for name in ("key_start", "q_start")}
    return shape.more | {
        name: torch.tensor(value) for name, value in starts.items() if value is not None
    }


def options(method: str, block_k: int, budget: int) -> list[dict[str, Any]]:
    """Some of the options of a method: those that are named here, or else other values of each."""
    stages = [[2 * block_k, 2 * budget, 3], [block_k, budget, 1]]
    some: dict[str, list[dict[str, Any]]] = {
        "hip": [
            {"weight": 1.0, "sample": 2},
            {"sample": 5, "descent": 3, "onward": 1},
            {"descent": 1, "onward": 0},
        ],
        "staged": [{"stages": stages}, {"stages": stages[1:], "halvings": 0}],
        "streaming": [{"recent": True}],
        "vertical_slash": [{"rows": 3, "vertical": 0.0}, {"vertical": 1.0}],
        "sample": [{"rows": 0.3}],
        "hyper": [{"block_size": 8, "sample_size": 8, "min_seq_len": 16, "lsh_num_projs": 3}],
    }
    return [{}, *(some.get(method) or other_options(method))]


def other_options(method: str) -> list[dict[str, Any]]:
    """A single option each time, near its default but not it. Only what the method allows."""
    found = []
    for option in dataclasses.fields(method_of(method).options):
        default = getattr(method_of(method).options(), option.name)
        near: list[Any] = []
        if isinstance(default, bool):
            near = [not default]
        elif isinstance(default, int):
            near = [default - 1, default + 1]
        elif isinstance(default, float):
            near = [default / 2, 2 * default]
        for value in near:
            fields: dict[str, Any] = dict(method=method, options={option.name: value})
            if refused(functools.partial(HiPConfig, **fields))[0] is not None:
                found.append(fields["options"])
    return found


@st.composite
def configs(
    draw: Draw, methods: tuple[str, ...] = tuple(METHODS), covers: bool | None = None
) -> HiPConfig:
    """Any settings. `covers`: whether the budget covers every context; None: either."""
    method = draw(st.sampled_from(("hip", "hip", *methods)))
    block_k = draw(st.sampled_from([1, 2, 4, 8]))
    covers = draw(st.booleans()) if covers is None else covers
    budget = COVERS if covers else block_k * draw(st.integers(1, 5))
    fields: dict[str, Any] = dict(
        method=method,
        block_k=block_k,
        budget=budget,
        block_q=draw(st.sampled_from([3, 16, 32])),
        sink=draw(st.sampled_from([0, 1, 4, 9])),
        window=draw(st.sampled_from([0, 1, 8, 21])),
        dense_below=draw(st.sampled_from([0, 0, 30, None])),
        dense_tail=draw(st.sampled_from([0, 0, 3, 64])),
        group_shared=draw(st.booleans()),
        decode_refresh=draw(st.sampled_from([1, 2, 4])),
        options=draw(st.sampled_from(options(method, block_k, budget))),
    )
    if selects(method):
        fields |= dict(
            query_stride=draw(st.sampled_from([1, 2, 3, 40])),
            vote=draw(st.sampled_from(VOTES)),
            representative=draw(st.sampled_from(REPRESENTATIVES)),
            score=draw(st.sampled_from(SCORES)),
            beam=draw(st.integers(1, 3)),
            rescore=draw(st.integers(1, 3)),
            coarsest=draw(st.sampled_from([None, block_k, 4 * block_k])),
        )
    if draw(st.integers(0, 7)) == 7:
        fields["delta"] = draw(st.sampled_from([1, 5, 16]))
    return HiPConfig(**fields)


def selected_alone(config: HiPConfig) -> bool:
    """Whether the output is attention to what is reported as selected, and nothing else."""
    return selects(config.method) and config.delta is None


def covers(config: HiPConfig, tokens: int) -> bool:
    """Whether every key must have been read."""
    return config.method == "dense" or (
        config.budget >= tokens and config.method not in ("streaming", "hyper")
    )


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp over the keys that are `visible`, in float64. Values that no row may
    read count as 0."""
    out, lse = eager(
        q,
        k,
        v,
        visible,
        shape.more.get("scale"),
        shape.more.get("softcap"),
        shape.more.get("sinks"),
    )
    return out, lse


def one_row(mask: BlockMask, row: int) -> BlockMask:
    """The mask of a batch row."""
    part = slice(row, row + 1)
    return BlockMask(
        mask.indices[part], mask.counts[part], mask.first[part], mask.block_q, mask.block_k
    )


def keys_read(
    mask: BlockMask,
    config: HiPConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    shape: Shape,
    windows: dict[int, int] | None = None,
) -> torch.Tensor:
    """The keys that a sparse call says it has read. `windows`: where that of a batch row's decode
    step begins."""
    parts = []
    for row in range(shape.batch):
        starts = [None if x is None else x[row : row + 1] for x in (shape.key_start, shape.q_start)]
        part = slice(row, row + 1)
        window = None if windows is None else windows.get(row)
        parts.append(
            read_mask(one_row(mask, row), config, q[part], k[part], *starts, shape.sliding, window)
        )
    return torch.cat(parts)
