"""What `hip-hf doctor` and the self-test run: every kernel on small problems, against the torch
backend in float64. The torch backend in other dtypes is checked alike.

Keys that a search must find are *planted*: they match all queries so much better than the other
candidates that the blocks to select are the same in every precision. What remains between the two
backends is then rounding. A decode step's selection also takes what follows its best blocks, in
place of its worst: which these are must not be a matter of rounding either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hip_hf.backends import base
from hip_hf.cache.pages import BlockTable, PagedTensor, Store
from hip_hf.config import HiPConfig
from hip_hf.problem import AttentionProblem, make_spans
from hip_hf.rope import Positions, Rope
from hip_hf.shown import said
from hip_hf.state import DecodeState

# Errors are counted in the rounding of the tensors' dtype: of outputs and gradients relative to the
# largest, of logarithms as they are. Tensor cores round weights and differences of gradients to the
# dtype; fp32 is made of three products of TF32.
ALLOWED = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 128.0}
# The torch backend, as plain PyTorch, rounds logits to the half precision that it multiplies in,
# and kernels do not. Those here are less than 16: by half of 8 times that rounding.
OF_LOGITS = 4.0
# Key heads, so that one head's numbers cannot pass for another's.
KEY_HEADS = 2
# What planted keys and the other candidates add to a logit; elsewhere it is 0, so that sink and
# window keep a weight that shows. Of two weak blocks the one after a strong one is read, by its
# part of what that has. Differences are several times that by which the random keys of two blocks
# differ.
STRONG, PLANTED, WEAK, OTHERS = 4.0, 2.0, 0.0, -3.0
# Neighbouring blocks that are planted together: a search that starts from larger chunks sees them
# as a quarter of one at least.
PLANTED_TOGETHER = 4
# Query rows of a prompt beyond its first query block and its dense tail; not aligned to anything.
REST = 5
# A few rows without a kept state: a decode step of several.
FEW_ROWS = 3
PAGE = 64
# HyperAttention at sizes at which a short prompt is split twice.
HYPER_SIZES = dict(min_seq_len=128, block_size=32, sample_size=32, lsh_num_projs=4)
HYPER_TOKENS = 400
SOFTCAP = 20.0
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Heads:
    """What of a call decides which programs Triton makes for it: dtype, head dims of keys and of
    values, query heads per key head."""

    dtype: torch.dtype = torch.bfloat16
    dim: int = 128
    dim_v: int = 128
    groups: int = 4


@dataclass
class Found:
    """The error of a check as a multiple of what is allowed (at most 1 is right), of its worst
    result; `problem`: what went wrong besides, or what was wrong."""

    name: str
    part: str
    error: float = 0.0
    problem: str = ""
    seconds: float = 0.0


@dataclass
class Trial:
    """A check in progress: random numbers, and `backend`'s worst error on `device` so far."""

    heads: Heads
    device: torch.device
    config: HiPConfig
    backend: str = "triton"
    error: float = 0.0
    worst: str = ""
    # what steps keep, of `backend` and of the exact one
    states: tuple[DecodeState | None, DecodeState | None] = (None, None)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> Tensor:
        """Random numbers that are the same in the tensors' dtype and in float64."""
        x = torch.randn(shape, generator=self.random, dtype=torch.float32, device="cpu")
        return x.to(self.heads.dtype)

    @property
    def rows(self) -> int:
        """Query rows of a prompt: a query block, the dense tail, and some more."""
        return self.config.block_q + self.config.dense_tail + REST

    @property
    def keys(self) -> int:
        """So many, not aligned to anything, that the upper levels of a search keep half of them."""
        config = self.config
        blocks = 2 * max(config.beam_blocks, config.budget_blocks) + 1
        return config.sink + config.window + blocks * config.block_k + REST

    def plain(self, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """q `[1, Hq, rows, D]`, k and v."""
        heads = self.heads
        q = self.normal(1, KEY_HEADS * heads.groups, rows, heads.dim)
        k = self.normal(1, KEY_HEADS, keys, heads.dim)
        return q, k, self.normal(1, KEY_HEADS, keys, heads.dim_v)

    def planted(self, rows: int, keys: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the budget's worth of planted keys between the key `first` and the window.
        Neighbouring blocks begin with a weak one and end with a strong one; another weak one
        follows, which takes the place of the first."""
        config, heads = self.config, self.heads
        q, k, v = self.plain(rows, keys)
        # in the second half of the head, which context extension does not turn here
        direction = torch.zeros(heads.dim, dtype=torch.float32, device="cpu")
        direction[heads.dim // 2 :] = (2 / heads.dim) ** 0.5
        strength = heads.dim**0.25

        def along(x: Tensor, size: float | Tensor) -> Tensor:
            """x with that size in the direction, in place of a random one."""
            x = x.float()
            return (x + (strength * size - x @ direction)[..., None] * direction).to(heads.dtype)

        logits = torch.zeros(keys, device="cpu")
        low = -(-max(first, config.sink) // config.block_k)
        runs = max(1, config.budget_blocks // PLANTED_TOGETHER)
        each = config.budget_blocks // runs
        last = (keys - rows - config.window - config.block_q) // config.block_k - each - 1
        logits[config.sink : keys - config.window] = OTHERS
        for run in range(runs):
            blocks = torch.full((each,), PLANTED, device="cpu")
            if each > 1:
                blocks[0], blocks[-1] = WEAK, STRONG
                blocks = torch.cat([blocks, blocks[:1]])
            at = (low + (last - low) * run // max(1, runs - 1)) * config.block_k
            each_key = blocks.repeat_interleave(config.block_k)
            logits[at : at + len(each_key)] = each_key
        return along(q, 1.0), along(k, logits), v

    def same(self, name: str, got: Tensor, want: Tensor, absolute: bool = False) -> None:
        """Take note of how far `got` is from `want`. NaN, and what is infinite in one of them
        alone, is infinitely far."""
        got, want = got.detach().double().cpu(), want.detach().double()
        miss = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf).max()
        size = 1.0 if absolute else float(want[want.isfinite()].abs().max())
        dtype = self.heads.dtype
        allowed = ALLOWED[dtype] + OF_LOGITS * (self.backend == "torch" and dtype != torch.float32)
        self._note(name, float(miss) / (size * torch.finfo(dtype).eps * allowed))

    def _note(self, name: str, error: float) -> None:
        if error > self.error:
            self.error, self.worst = error, name

    def both(
        self, q: Tensor, k: Tensor, v: Tensor, config: HiPConfig, pages: bool = False, **fields: Any
    ) -> None:
        """Compare a call with the torch backend's in float64: out, log-sum-exp, and selection."""

        def problem(device: torch.device, dtype: torch.dtype) -> AttentionProblem:
            given = dict(q=q, k=k, v=v, **fields)
            for name, x in given.items():
                given[name] = x.to(device, dtype) if isinstance(x, Tensor) else x
            return AttentionProblem(spans=make_spans(q, k), scale=q.shape[-1] ** -0.5, **given)

        tested = problem(self.device, self.heads.dtype)
        if pages:
            count = -(-k.shape[2] // PAGE)
            table = BlockTable(torch.randperm(count, generator=self.random, device="cpu").tolist())
            tested = replace(tested, k=in_pages(tested.k, table), v=in_pages(tested.v, table))
        mask = config.method == "hip"  # others select no blocks
        exact, (state, other) = problem(torch.device("cpu"), torch.float64), self.states
        got = base.attend(tested, replace(config, backend=self.backend), None, state, True, mask)
        want = base.attend(exact, replace(config, backend="torch"), None, other, True, mask)
        assert got.lse is not None
        assert want.lse is not None
        assert got.path == want.path, got.reason
        self.same("out", got.out, want.out)
        self.same("log-sum-exp", got.lse, want.lse, absolute=True)
        if got.mask is None or want.mask is None:
            return
        counts = got.mask.counts.cpu()
        there = torch.arange(got.mask.indices.shape[-1], device="cpu") < counts[..., None]
        differ = (got.mask.indices.cpu() != want.mask.indices) & there
        if not torch.equal(counts, want.mask.counts) or differ.any():
            self._note("selected blocks", float("inf"))


def in_pages(x: Tensor, table: BlockTable) -> PagedTensor:
    """Keys (or values) `[1, H, T, D]` in the pages of `table`."""
    _, heads, tokens, dim = x.shape
    store = Store(heads, dim, x.dtype, x.device, PAGE)
    store.arenas, store.bounds = [store.make_arena(len(table))], [0]
    store.write(table, 0, x[0])
    return PagedTensor(store, [table], tokens)


def check_prompt(trial: Trial) -> None:
    """Pyramid, selection and attention of a prompt's last rows, its dense tail among them."""
    trial.both(*trial.planted(trial.rows, trial.keys), trial.config)


def check_decode(trial: Trial) -> None:
    """A prompt and steps on a kept state, until the selection has been made anew and kept again."""
    config, keys = trial.config, trial.keys
    assert isinstance(config.decode_refresh, int)
    rows, trial.states = config.block_q + config.decode_refresh + 2, (DecodeState(), DecodeState())
    q, k, v = trial.planted(rows, keys)
    for first, last in pairwise([0, *range(config.block_q, rows + 1)]):
        end = keys - rows + last
        trial.both(q[:, :, first:last], k[:, :, :end], v[:, :, :end], config)


def check_pages(trial: Trial) -> None:
    """Keys in pages, with all that changes logits: a prompt, and a step of a few rows."""
    config, keys = trial.config, trial.keys
    sinks = trial.normal(KEY_HEADS * trial.heads.groups)
    window = keys - 2 * config.block_q
    fields: dict[str, Any] = dict(softcap=SOFTCAP, sliding_window=window, sinks=sinks)
    q, k, v = trial.planted(trial.rows, keys, first=4 * config.block_q)
    trial.both(q, k, v, config, pages=True, **fields)
    trial.both(q[:, :, -FEW_ROWS:], k, v, config, pages=True, **fields)


def check_dense(trial: Trial) -> None:
    """Dense attention where PyTorch's own does not serve."""
    config = replace(trial.config, method="dense")
    q, k, v = trial.plain(trial.config.block_q, trial.keys)
    for rows in (trial.config.block_q, 1):
        trial.both(q[:, :, -rows:], k, v, config, softcap=SOFTCAP)


def check_gradients(trial: Trial) -> None:
    """Gradients of q, k, v and sinks through the selection's attention and the dense tail."""
    config, heads = trial.config, trial.heads
    q, k, v = trial.planted(trial.rows, trial.keys)
    sinks = trial.normal(q.shape[1])
    weight, weight_lse = trial.normal(*q.shape[:3], heads.dim_v), trial.normal(*q.shape[:3])
    grads = []
    with torch.enable_grad():
        exact = (torch.device("cpu"), torch.float64, "torch")
        for device, dtype, backend in ((trial.device, heads.dtype, trial.backend), exact):
            leaves = [x.to(device, dtype).detach().requires_grad_() for x in (q, k, v, sinks)]
            queries, keys, values, logits = leaves
            spans, scale = make_spans(q, k), heads.dim**-0.5
            problem = AttentionProblem(queries, keys, values, spans, scale, sinks=logits)
            result = base.attend(problem, replace(config, backend=backend), None, None, True)
            assert result.lse is not None
            into = [weight.to(device, result.out.dtype), weight_lse.to(device, result.lse.dtype)]
            grads.append(torch.autograd.grad([result.out, result.lse], leaves, into))
    for name, got, want in zip(("q", "k", "v", "sinks"), *grads, strict=True):
        trial.same(f"gradient of {name}", got, want)


def check_hyper(trial: Trial) -> None:
    """HyperAttention: hashes, leaves and squares."""
    config = replace(trial.config, method="hyper", options=HYPER_SIZES)
    trial.both(*trial.plain(HYPER_TOKENS, HYPER_TOKENS), config)


def check_delta(trial: Trial) -> None:
    """Delta correction: dense rows at a stride, and what they correct."""
    config = trial.config
    q, k, v = trial.planted(config.block_q + trial.rows, trial.keys)
    trial.both(q, k, v, replace(config, delta=config.block_q // 2))


def check_extended(trial: Trial) -> None:
    """Context extension: q and k rotated as they are read, of a prompt, its dense rows, a step."""
    config = replace(trial.config, extend="streaming")
    pairs = max(1, trial.heads.dim // 4)
    steps = torch.linspace(0, 1, pairs, dtype=torch.float32, device="cpu")
    reach = config.sink + config.budget + config.window + 2 * config.block_q
    positions = Positions(Rope(ROPE_BASE**-steps), reach)
    q, k, v = trial.planted(trial.rows, trial.keys)
    for rows in (q.shape[2], FEW_ROWS):
        trial.both(q[:, :, -rows:], k, v, config, positions=positions)


# What depends on which kernels: a call asks for those of its parts.
SPARSE, GRADIENTS, HYPER, DELTA, EXTENDED = "sparse", "gradients", "hyper", "delta", "extended"
CHECKS: dict[str, tuple[str, Callable[[Trial], None]]] = {
    "prompt": (SPARSE, check_prompt),
    "decode": (SPARSE, check_decode),
    "pages": (SPARSE, check_pages),
    "dense": (SPARSE, check_dense),
    "gradients": (GRADIENTS, check_gradients),
    "hyper": (HYPER, check_hyper),
    "delta": (DELTA, check_delta),
    "extended": (EXTENDED, check_extended),
}


def lost(device: torch.device) -> str:
    """What to say where the process can use a GPU no more: a kernel that reads or writes outside of
    its tensors leaves it no context, so that even dense attention fails there until it ends. Empty
    where the device still answers."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        anew = 'start anew with backend="torch" or method="dense"'
        return f" (this process can use the GPU no more: {anew})"
    return ""


def check(
    name: str, heads: Heads, device: torch.device, config: HiPConfig, backend: str = "triton"
) -> Found:
    """Run one of `CHECKS` on a backend. What it raises becomes its `problem`, but for want of
    memory, which says nothing of the kernels.

    Raises:
        torch.OutOfMemoryError: the device's memory is full.
    """
    part, compare = CHECKS[name]
    trial, start = Trial(heads, device, config, backend), time.perf_counter()
    found = Found(name, part)
    try:
        compare(trial)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers, drivers and launches have no common type
        found.error, found.problem = float("inf"), said(error) + lost(device)
    else:
        found.error = trial.error
        if not trial.error <= 1:
            found.problem = f"{trial.worst}: {trial.error:.3g} times the error that is allowed"
    found.seconds = time.perf_counter() - start
    return found
