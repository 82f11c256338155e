"""Attention problems with random selections for the kernel tests, and what the torch reference
makes of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from helpers import assert_near, eager, make_qkv, sparse
from interpreter import DEVICE
from tensor_cores import Emulation, Reordered, TensorCores

from hip_hf.attention import Result
from hip_hf.backends.tensors import tensors_of
from hip_hf.backends.torch.block_sparse import attend_blocks, attend_range
from hip_hf.backends.triton.common.arguments import Logits, Operands, Part, Reads
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.backends.triton.common.tuning import precision_of
from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, Span, query_blocks
from hip_hf.problem import AttentionProblem

# Orders of summation in which plain PyTorch is measured.
ORDERS = 8


def spans_of(*lengths: tuple[int, int, int]) -> list[Span]:
    """One span per batch row from (first real key, keys, query rows): the queries are the last of
    the keys."""
    return [
        Span(b, start, start + keys, 0, rows, keys - rows)
        for b, (start, keys, rows) in enumerate(lengths)
    ]


def precisions(q: torch.Tensor, *dims: int) -> list[AbstractContextManager[Any]]:
    """Ways for plain PyTorch, by whose largest error kernels are measured, to multiply operands
    like `q`: its own, in several orders of summation, and in fp32 on NVIDIA GPUs that of the
    kernels, three products of TF32. `dims`: head dims.

    One order is one draw: its largest error is by luck up to four times that of another, so twice
    the error of one would refuse kernels that are as exact, a processor here and a processor there
    (docs/decisions.md).
    """
    on_gpu = DEVICE == "cuda" or Emulation.active
    seeds = range(ORDERS - 1)
    if on_gpu and q.dtype == torch.float32 and precision_of(q) == "tf32x3":
        return [nullcontext(), TensorCores(dims), *(TensorCores(dims, seed=seed) for seed in seeds)]
    return [nullcontext(), *map(Reordered, seeds)]


@dataclass
class Case:
    """q `[B, Hq, Tq, D]`, k, v, spans, and for each span the blocks that every list of heads and
    query block reads."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    spans: list[Span]
    config: HiPConfig
    indices: torch.Tensor
    counts: torch.Tensor
    scale: float
    fields: dict[str, Any]  # softcap, sliding_window, sinks
    per_row: bool = False  # decode: each row is a query block

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def blocks(self, span: Span) -> list[QueryBlock]:
        relative = Span(span.batch, 0, span.keys, 0, span.rows, span.position)
        return query_blocks(self.config, relative, self.per_row, self.fields.get("sliding_window"))

    def reads(self, **fields: Any) -> Reads:
        config = self.config
        lists = dict(indices=self.indices.to(DEVICE), counts=self.counts.to(DEVICE))
        return Reads(
            1 if self.per_row else config.block_q,
            config.block_k,
            config.sink,
            config.window,
            **lists,
            **fields,
        )

    def logits(self) -> Logits:
        sinks = self.fields.get("sinks")
        return Logits(
            self.scale, **{**self.fields, "sinks": None if sinks is None else sinks.to(DEVICE)}
        )

    def sequences(self) -> Sequences:
        return Sequences.of(self.spans, torch.device(DEVICE))

    def part(self, reads: Reads | None = None) -> Part:
        """All rows, with what they read if not the case's lists."""
        return Part(self.sequences(), reads or self.reads())

    def operands(self, out: torch.Tensor, lse: torch.Tensor | None, page_size: int = 0) -> Operands:
        return Operands(self.q.to(DEVICE), self.kv(page_size), self.logits(), out, lse)

    def kv(self, page_size: int = 0) -> KeyValues:
        """Keys and values on the device; with a page size, scattered over pages in random order
        among pages of NaN."""
        if not page_size:
            return KeyValues(self.k.to(DEVICE), self.v.to(DEVICE))
        batch, heads, tokens, _ = self.k.shape
        each = -(-tokens // page_size)
        table = torch.randperm(batch * each + 3)[: batch * each].view(batch, each)
        pages = []
        for x in (self.k, self.v):
            page = torch.full(
                (batch * each + 3, page_size, heads, x.shape[-1]), torch.nan, dtype=x.dtype
            )
            full = torch.nn.functional.pad(x, (0, 0, 0, each * page_size - tokens))
            page[table] = full.unflatten(2, (each, page_size)).permute(0, 2, 3, 1, 4)
            pages.append(page.to(DEVICE))
        return KeyValues(*pages, table.int().to(DEVICE))

    def problem(self, dtype: torch.dtype = torch.float64) -> AttentionProblem:
        return AttentionProblem(
            self.q.to(dtype),
            self.k.to(dtype),
            self.v.to(dtype),
            tuple(self.spans),
            self.scale,
            **self.fields,
        )

    def chosen(self, at: int, head: int, block: int) -> torch.Tensor:
        """Key blocks that query head `head` of span `at` reads in its query block `block`."""
        which = head * self.indices.shape[1] // self.q.shape[1]
        return self.indices[at, which, block, : self.counts[at, which, block]].long()

    def visible(self) -> torch.Tensor:
        """The keys each row reads, `[B, Hq, Tq, Tk]`."""
        batch, heads, rows, _ = self.q.shape
        bk, sliding = self.config.block_k, self.fields.get("sliding_window")
        out = torch.zeros(batch, heads, rows, self.k.shape[2], dtype=torch.bool)
        for at, span in enumerate(self.spans):
            key = torch.arange(span.keys)
            for i, block in enumerate(self.blocks(span)):
                position = torch.arange(block.first, block.last + 1)[:, None]
                seen = key <= position
                if sliding is not None:
                    seen &= key > position - sliding
                for head in range(heads):
                    read = (
                        (key < block.sink_end)
                        | (key >= block.window_start)
                        | torch.isin(key // bk, self.chosen(at, head, i))
                    )
                    row = span.row_start + block.row
                    out[span.batch, head, row : row + block.rows, span.key_start : span.key_end] = (
                        seen & read
                    )
        return out

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """The torch reference in `dtype`: out and lse; NaN outside every span."""
        problem = self.problem(dtype)
        out = torch.full((*self.q.shape[:3], self.v.shape[-1]), torch.nan, dtype=dtype)
        lse = torch.full(self.q.shape[:3], torch.nan, dtype=dtype)
        for at, span in enumerate(self.spans):
            t = tensors_of(problem, span, out, lse)
            for i, block in enumerate(self.blocks(span)):
                for head in range(self.q.shape[1]):
                    kv_head, member = head // self.groups, head % self.groups
                    ids = self.chosen(at, head, i)[None, None]
                    own = t.part(slice(kv_head, kv_head + 1), slice(member, member + 1))
                    attend_blocks(own, [block], ids, self.config.block_k)
        return out, lse

    def dense_reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention of the same problem, likewise."""
        problem = self.problem()
        out = torch.full((*self.q.shape[:3], self.v.shape[-1]), torch.nan, dtype=torch.float64)
        lse = torch.full(self.q.shape[:3], torch.nan, dtype=torch.float64)
        for span in self.spans:
            t = tensors_of(problem, span, out, lse)
            first, last = span.position, span.end - 1
            start = max(0, first + 1 - (self.fields.get("sliding_window") or first + 1))
            block = QueryBlock(0, first, last, start, start, 0, 0, start)
            attend_range(t, block)
        return out, lse

    def tolerances(self, visible: torch.Tensor) -> tuple[float, float]:
        """Twice the error of plain attention in the case's own dtype and precision, of out and of
        lse (fp32).

        Few values may all round well by luck, so an error counts as one unit in the last place of
        the largest value at least.
        """
        fields = dict(
            scale=self.scale, softcap=self.fields.get("softcap"), sinks=self.fields.get("sinks")
        )
        exact = eager(self.q, self.k, self.v, visible, **fields)
        real, out, lse = visible.any(-1), 0.0, 0.0
        for precision in precisions(self.q, self.q.shape[-1]):
            with precision:
                plain = eager(self.q, self.k, self.v, visible, dtype=self.q.dtype, **fields)
            errors = (
                2
                * max(
                    float((a.double() - b)[real].abs().max()),
                    torch.finfo(dtype).eps * float(b[real].abs().max()),
                )
                for a, b, dtype in zip(plain, exact, (self.q.dtype, torch.float32), strict=True)
            )
            out, lse = map(max, (out, lse), errors)
        return out, lse

    def empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse on the device, poisoned."""
        shape = self.q.shape[:3]
        out = torch.full((*shape, self.v.shape[-1]), torch.nan, dtype=self.q.dtype, device=DEVICE)
        return out, torch.full(shape, torch.nan, device=DEVICE)


def make_case(
    spans: list[Span] | None = None,
    heads: int = 2,
    groups: int = 2,
    dim: int = 64,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    shared: bool = True,
    most: int = 5,
    per_row: bool = False,
    rows: int | None = None,
    tokens: int | None = None,
    block_q: int = 16,
    block_k: int = 16,
    sink: int = 20,
    window: int = 24,
    scale: float | None = None,
    **fields: Any,
) -> Case:
    """A random case. Every query block reads a random number, up to `most`, of its candidates."""
    spans = spans_of((0, 125, 125)) if spans is None else spans
    batch = max(span.batch for span in spans) + 1
    rows = max(span.row_end for span in spans) if rows is None else rows
    tokens = max(span.key_end for span in spans) if tokens is None else tokens
    q = (
        torch.randn(batch, rows, heads * groups, dim).to(dtype).transpose(1, 2)
    )  # as Transformers lays them out
    k = torch.randn(batch, heads, tokens, dim).to(dtype)
    v = torch.randn(batch, heads, tokens, dv or dim).to(dtype)
    config = HiPConfig(
        block_q=block_q, block_k=block_k, sink=sink, window=window, budget=most * block_k
    )
    case = Case(q, k, v, spans, config, q, q, scale or dim**-0.5, fields, per_row)
    lists = heads if shared else heads * groups
    blocks = max(len(case.blocks(span)) for span in spans)
    # what no list names is poison: a kernel that followed it would leave the tensor far behind
    case.indices = torch.full((len(spans), lists, blocks, most), 2**24, dtype=torch.int32)
    case.counts = torch.zeros(len(spans), lists, blocks, dtype=torch.int32)
    for at, span in enumerate(spans):
        for i, block in enumerate(case.blocks(span)):
            for one in range(lists):
                count = int(torch.randint(min(most, block.num_candidates) + 1, ()))
                chosen = block.low + torch.randperm(block.num_candidates)[:count].sort().values
                case.indices[at, one, i, :count] = chosen.int()
                case.counts[at, one, i] = count
    return case


def check(
    case: Case, out: torch.Tensor, lse: torch.Tensor | None, want: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The kernel's error is at most twice that of plain attention in the same dtype; rows outside
    every span are untouched."""
    tolerance, lse_tolerance = case.tolerances(case.visible())
    real = torch.zeros(case.q.shape[0], case.q.shape[2], dtype=torch.bool)
    for span in case.spans:
        real[span.batch, span.row_start : span.row_end] = True
    outside = ~real[:, None].expand(case.q.shape[:3])
    assert out.cpu()[outside].isnan().all(), "rows outside every sequence were written"
    assert_near(
        out.cpu().masked_fill(outside[..., None], 0),
        want[0].masked_fill(outside[..., None], 0),
        tolerance,
    )
    if lse is not None:
        assert_near(
            lse.cpu().masked_fill(outside, 0), want[1].masked_fill(outside, 0), lse_tolerance, "lse"
        )


def call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: HiPConfig,
    state: Any = None,
    need_mask: bool = False,
    **fields: Any,
) -> Result:
    """A sparse call with log-sum-exp; on `DEVICE` if the kernels serve it."""
    device = DEVICE if config.backend == "triton" else "cpu"
    sinks = fields.pop("sinks", None)
    tensors = (x.to(device) for x in (q, k, v))
    fields["sinks"] = None if sinks is None else sinks.to(device)
    result = sparse(*tensors, config, state=state, need_mask=need_mask, **fields)
    assert result.reason == ""
    return result


def assert_same(got: Result, want: Result, near: float) -> None:
    """Output, log-sum-exp and share of keys read of two `call`s."""
    assert_near(got.out.cpu(), want.out, near)
    assert got.lse is not None
    assert want.lse is not None
    assert_near(got.lse.cpu(), want.lse, near, "lse")
    assert got.density == want.density


def assert_half_precision(triton: HiPConfig, torch_backend: HiPConfig) -> None:
    """In fp16 the kernels are as exact as the torch backend in fp32, rounded."""
    q, k, v = make_qkv(100, dim=64, dtype=torch.float16)
    exact = call(*(x.double() for x in (q, k, v)), torch_backend).out
    plain = call(*(x.float() for x in (q, k, v)), torch_backend).out.half()
    got = call(q, k, v, triton).out
    assert got.dtype == torch.float16
    least = torch.finfo(torch.float16).eps * float(exact.abs().max())
    assert_near(got.cpu(), exact, 2 * max(least, float((plain - exact).abs().max())))
