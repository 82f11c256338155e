"""A call of typical shape, for compiling kernels and for choosing their launch configurations:
heads as in Llama 3.1 8B, default settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hip_hf.backends.triton.common.arguments import Logits, Operands, Part, Reads
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.config import HiPConfig
from hip_hf.rope import Positions, Rope

QUERY_HEADS, KEY_HEADS, PAGE_SIZE = 32, 8, 256


@dataclass(kw_only=True)
class Example(Operands):
    """On the device `meta`, shapes and strides without memory; elsewhere random tensors and
    selections. `part`: all of its rows. `suffix` tells paged calls apart."""

    lse: torch.Tensor
    part: Part
    suffix: str


def example(
    dim: int,
    dtype: torch.dtype,
    paged: bool = False,
    rows: int | None = None,
    block_q: int = 64,
    tokens: int = 4096,
    device: str = "meta",
) -> Example:
    """`rows` (default: all) query rows of head dim `dim` at the end of `tokens` keys. `paged`:
    pages, and every feature of the logits."""
    rows, config = rows or tokens, HiPConfig()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def integers(*shape: int, high: int = 1) -> torch.Tensor:
        return torch.randint(high, shape, dtype=torch.int32, device=device)

    if paged:
        k, v = (random(tokens // PAGE_SIZE, PAGE_SIZE, KEY_HEADS, dim) for _ in "kv")
        kv = KeyValues(k, v, integers(1, tokens // PAGE_SIZE, high=tokens // PAGE_SIZE))
        logits = Logits(dim**-0.5, 50.0, tokens, random(QUERY_HEADS))
    else:
        kv = KeyValues(*(random(1, KEY_HEADS, tokens, dim) for _ in "kv"))
        logits = Logits(dim**-0.5)
    numbers, lists = integers(5, 1), (1, KEY_HEADS, -(-rows // block_q))
    most = config.budget_blocks
    counts, indices = integers(*lists), integers(*lists, most)
    windows = integers(1, rows) if block_q == 1 else None
    if device != "meta":
        position = torch.arange(tokens - rows, tokens, block_q, device=device)
        start = ((position - config.window).clamp(min=0) // config.block_k).int()
        low = config.sink // config.block_k
        counts[:] = (start - low).clamp(0, most)
        # every k-th candidate, from a random one on
        step = ((start - low) // most).clamp(min=1)[:, None]
        offset = (torch.rand(*lists, 1, device=device) * step).int()
        indices[:] = low + torch.arange(most, device=device) * step + offset
        numbers[3], numbers[4] = rows, tokens - rows
        if windows is not None:
            windows[:] = start * config.block_k
    reads = Reads(block_q, config.block_k, config.sink, config.window, indices, counts, windows)
    q, out = random(1, QUERY_HEADS, rows, dim), random(1, QUERY_HEADS, rows, dim)
    lse = torch.zeros(1, QUERY_HEADS, rows, device=device)
    suffix = ", all features" if paged else ""
    part = Part(Sequences(numbers, rows, tokens), reads)
    return Example(q=q, kv=kv, logits=logits, out=out, lse=lse, part=part, suffix=suffix)


def example_positions(dim: int) -> Positions:
    """Positions of a model that rotates whole heads of `dim` numbers."""
    return Positions(Rope(torch.ones(dim // 2)), 1024)


def with_extension(x: Example) -> Example:
    """The same call under context extension."""
    logits = replace(x.logits, positions=example_positions(x.q.shape[-1]))
    return replace(x, logits=logits, suffix=f"{x.suffix}, extended")
