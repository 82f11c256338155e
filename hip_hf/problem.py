"""`AttentionProblem`: what a method and a backend see of an attention call. Validated once, at the
border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from hip_hf.config import HiPConfig
from hip_hf.geometry import Span
from hip_hf.rope import Positions
from hip_hf.shown import refused

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPE_NAMES = "float16, bfloat16, float32 or float64"


def by_tokens(q: Tensor, dim: int) -> Tensor:
    """An output of `dim` numbers a row for q `[B, Hq, Tq, D]`, not filled yet: `[B, Hq, Tq, dim]`
    as always, with all heads of a token side by side in memory. Models go on with it so, and need
    no copy."""
    batch, heads, rows, _ = q.shape
    return q.new_empty(batch, rows, heads, dim).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """Shapes: q `[B, Hq, Tq, D]`, k `[B, Hkv, Tk, D]`, v `[B, Hkv, Tk, Dv]`, sinks `[Hq]` (extra
    logits)."""

    q: Tensor
    k: Tensor
    v: Tensor
    spans: tuple[Span, ...]
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    positions: Positions | None = None  # q and k are not rotated, and are placed by these

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def needs_grad(self) -> bool:
        """Whether autograd wants to know about the call."""
        tensors = (self.q, self.k, self.v, self.sinks)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    @property
    def longest(self) -> int:
        """Most keys that any query row may see."""
        return max([span.end for span in self.spans] or [0])


def exporting() -> bool:
    """Whether torch.export makes a graph of this call."""
    # The flag, not `torch.compiler.is_exporting()`, which PyTorch 2.11 answers with yes in any
    # graph of torch.compile.
    exports: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    if exports is not None:
        return exports
    # PyTorch 2.6 has no such flag. An export compiles without Dynamo there, except a strict one,
    # which it cannot make of a model.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def tracing() -> str:
    """What follows the tensors of this call and could not follow a selection, or an empty string:
    it gets dense attention."""
    if exporting():
        return "torch.export"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.compiler.is_compiling():  # which has interpreters of its own there
        return ""
    return "torch.func" if torch._C._functorch.peek_interpreter_stack() is not None else ""


def fail(name: str, value: object, allowed: str) -> NoReturn:
    """Raise ValueError for an argument: what was got, and what is allowed."""
    raise refused(name, value, allowed)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError if shapes, dtypes and devices of q `[B, Hq, Tq, D]`, k `[B, Hkv, T, D]` and
    v `[B, Hkv, T, Dv]` do not fit together."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            got = tuple(getattr(tensor, "shape", ())) or type(tensor).__name__
            fail(name, got, "a tensor [batch, heads, tokens, head dim]")
        if tensor.layout != torch.strided:
            fail(f"{name}.layout", tensor.layout, "torch.strided (a dense tensor)")
        if 0 in tensor.shape:
            fail(f"{name}.shape", tuple(tensor.shape), "no empty dimension")
        if tensor.dtype not in DTYPES:
            fail(f"{name}.dtype", tensor.dtype, DTYPE_NAMES)
        if tensor.dtype != q.dtype:
            fail(f"{name}.dtype", tensor.dtype, f"{q.dtype}, as q has")
        if tensor.device != q.device:
            fail(f"{name}.device", tensor.device, f"{q.device}, where q is")
    if k.shape[:3] != v.shape[:3]:
        fail("v.shape", tuple(v.shape), f"batch, heads and tokens of k {tuple(k.shape[:3])}")
    if q.shape[0] != k.shape[0]:
        fail("k.shape", tuple(k.shape), f"q's batch size {q.shape[0]}")
    if q.shape[3] != k.shape[3]:
        fail("k.shape", tuple(k.shape), f"q's head dim {q.shape[3]}")
    if q.shape[1] % k.shape[1]:
        fail("q.shape", tuple(q.shape), f"a multiple of k's {k.shape[1]} heads")


def check_numbers(**given: float | None) -> None:
    """Raise ValueError where one of the arguments `given` is neither None nor finite and above
    0."""
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < float("inf")):
            fail(name, repr(value), "None or a finite number > 0")


def check_call(
    problem: AttentionProblem, config: HiPConfig, layer: int | None, numbers: bool
) -> None:
    """Raise ValueError for arguments of `hip_attention`, besides tensors and numbers, that are out
    of range or do not fit together. `numbers`: whether those in the sinks may be looked at."""
    q, sliding = problem.q, problem.sliding_window
    for name, count, low in (("sliding_window", sliding, 1), ("layer", layer, 0)):
        if count is not None and (type(count) is not int or count < low):
            fail(name, repr(count), f"None or an integer >= {low}")
    if problem.sinks is not None:
        _check_sinks(problem.sinks, q, numbers)
    if problem.positions is not None and not isinstance(problem.positions, Positions):
        fail("positions", type(problem.positions).__name__, "None or Positions")
    if (problem.positions is None) != (config.extend is None):
        wanted = f"Positions, for config.extend={config.extend!r}"
        allowed = "None without config.extend" if config.extend is None else wanted
        fail("positions", problem.positions, allowed)
    if problem.positions is not None:
        turning = problem.positions.rope.dim
        if turning > q.shape[3]:
            got = f"{turning} numbers that turn"
            fail("positions.rope", got, f"up to q's head dim {q.shape[3]}")
        if sliding is not None:
            allowed = "allowed with `extend`: None (a window needs no extension)"
            raise ValueError(f"sliding_window: got {sliding}, {allowed}")
        problem.positions.check(config)
    if q.shape[2] > problem.k.shape[2]:
        fail("q.shape", f"{q.shape[2]} query rows", f"at most the {problem.k.shape[2]} keys")


def _check_sinks(sinks: Tensor, q: Tensor, numbers: bool) -> None:
    if not isinstance(sinks, Tensor):
        fail("sinks", type(sinks).__name__, f"None or a tensor [{q.shape[1]}]")
    if sinks.shape != q.shape[1:2] or sinks.device != q.device:
        got = f"shape {tuple(sinks.shape)} on {sinks.device}"
        fail("sinks", got, f"{tuple(q.shape[1:2])} on {q.device}")
    if sinks.dtype not in DTYPES:
        fail("sinks.dtype", sinks.dtype, DTYPE_NAMES)
    if numbers and sinks.device.type == "cpu" and not sinks.isfinite().all():
        fail("sinks", sinks.tolist(), "finite numbers")


def _per_row(
    name: str, value: Tensor | int | list[int] | None, batch: int, default: int
) -> list[int]:
    if value is None:
        return [default] * batch
    values = value.tolist() if isinstance(value, Tensor) else value
    values = [values] * batch if isinstance(values, int) else values
    several = isinstance(values, (list, tuple)) and len(values) == batch
    if not several or not all(type(x) is int for x in values):
        fail(name, value, f"one integer for each of the {batch} batch rows")
    return list(values)


def make_spans(
    q: Tensor, k: Tensor, key_start: Tensor | None = None, q_start: Tensor | None = None
) -> tuple[Span, ...]:
    """Spans of a batch whose row `b` has its first real key at `key_start[b]` and its first query
    at `q_start[b]`."""
    batch, _, rows, _ = q.shape
    keys = k.shape[2]
    first = _per_row("key_start", key_start, batch, 0)
    query = _per_row("q_start", q_start, batch, keys - rows)
    spans = []
    for b, (start, at) in enumerate(zip(first, query, strict=True)):
        if not 0 <= start <= keys:
            fail(f"key_start[{b}]", start, f"0 to {keys}, the number of keys")
        if not 0 <= at <= keys - rows:
            allowed = f"0 to {keys - rows}, so that all {rows} query rows have keys"
            fail(f"q_start[{b}]", at, allowed)
        row_start = max(0, start - at)
        if row_start < rows:
            spans.append(Span(b, start, at + rows, row_start, rows, at + row_start - start))
    return tuple(spans)


def check_finite(name: str, x: Tensor, spans: tuple[Span, ...], rows: bool) -> None:
    """Raise ValueError where a real row (of queries or keys) of `x` `[B, heads, tokens, dim]` holds
    NaN or infinity. One pass over them is enough when all is well."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for span in spans:
        part = slice(span.row_start, span.row_end) if rows else slice(span.key_start, span.key_end)
        real = x[span.batch, :, part]
        if torch.isfinite(real.sum(dtype=dtype)):
            continue
        bad = (~torch.isfinite(real)).nonzero()
        if len(bad):
            head, token, dim = bad[0].tolist()
            where = (span.batch, head, part.start + token, dim)
            fail(f"{name}{list(where)}", x[where].item(), f"finite numbers ({len(bad)} are not)")
