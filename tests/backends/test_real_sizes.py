"""No kernel's offset wraps at a million tokens of sixteen sequences, and none leaves its tensor:
heads as in Llama 3.1 8B, in a harsher interpreter, on memory that is there only where it is touched
(`vast.py`). Of each launch the last programs run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from interpreter import DEVICE, interpreter
from sanitizer import Sanitizer, last_of
from vast import Vast

from hip_hf.backends.triton.attention import prefill
from hip_hf.backends.triton.attention.backward import (
    Inverted,
    key_gradient_arguments,
    query_gradient_arguments,
)
from hip_hf.backends.triton.attention.decode import DecodeScratch, decode
from hip_hf.backends.triton.attention.gradients import key_gradient_kernel, query_gradient_kernel
from hip_hf.backends.triton.common.arguments import Logits, Operands, Part, Reads, dense_reads
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences, offsets_in
from hip_hf.backends.triton.common.tuning import Tile, tile_of
from hip_hf.backends.triton.compile.catalogue import hash_launch, square_launches
from hip_hf.backends.triton.compile.examples import example
from hip_hf.backends.triton.delta import spread_arguments, spread_kernel
from hip_hf.backends.triton.pyramid import KeyPyramid
from hip_hf.backends.triton.selection.search import SelectionBuffers, select
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="it is the interpreter that finds numbers that wrap"
)

TOKENS, BATCH, HEADS, KEY_HEADS, DIM, PAGE = 2**20, 16, 32, 8, 128, 256
DTYPE = torch.bfloat16
CONFIG = HiPConfig(window=128)  # the last tile of summaries has blocks that are needed
BLOCKS = TOKENS // CONFIG.block_k
# Key blocks that a prompt's search needs: those in front of its last query block's window.
NEEDED = (TOKENS - CONFIG.block_q - CONFIG.window) // CONFIG.block_k
TILE = Tile(64, 64, 8, 1)
LOGITS = Logits(DIM**-0.5)
# Query rows of prompts: as many as make the last of the query blocks that are laid out full, the
# first being cut.
ROWS = TOKENS - CONFIG.block_q + 1
# Rows at the end of a prompt, likewise, and where the keys begin of sequences that have no more.
FEW = 2 * CONFIG.block_q + 1
LATE = TOKENS - FEW - CONFIG.block_q + 1


@pytest.fixture(autouse=True)
def sanitizer() -> Iterator[Sanitizer]:
    with Vast(), Sanitizer(0, last=True) as entered:
        yield entered
    assert not entered.found


def tensor(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def queries(rows: int = ROWS) -> torch.Tensor:
    """As Transformers lays them out."""
    return tensor(BATCH, rows, HEADS, DIM).transpose(1, 2)


def keys(paged: bool = False) -> KeyValues:
    if not paged:
        return KeyValues(
            tensor(BATCH, KEY_HEADS, TOKENS, DIM), tensor(BATCH, KEY_HEADS, TOKENS, DIM)
        )
    pages = BATCH * TOKENS // PAGE
    table = torch.arange(pages, dtype=torch.int32).view(BATCH, -1)
    return KeyValues(
        tensor(pages, PAGE, KEY_HEADS, DIM), tensor(pages, PAGE, KEY_HEADS, DIM), table
    )


def sequences(rows: int = ROWS, first: int = 0, query_rows: int = ROWS) -> Sequences:
    """`rows` query rows at the end of `query_rows`, of sequences that begin with key `first`."""
    spans = [
        Span(b, first, TOKENS, query_rows - rows, query_rows, TOKENS - first - rows)
        for b in range(BATCH)
    ]
    return Sequences.of(spans, torch.device("cpu"))


def reads(blocks: int) -> Reads:
    """The last query block of the last sequence reads the last of its candidates."""
    most = CONFIG.budget_blocks
    indices, counts = (
        tensor(BATCH, KEY_HEADS, blocks, *more, dtype=torch.int32) for more in ((most,), ())
    )
    indices[-1, -1, -1], counts[-1, -1, -1] = (
        torch.arange(NEEDED - most, NEEDED, dtype=torch.int32),
        most,
    )
    return Reads(CONFIG.block_q, CONFIG.block_k, CONFIG.sink, CONFIG.window, indices, counts)


def pyramid(kv: KeyValues, rows: Sequences, block_q: int) -> KeyPyramid:
    """All but its last blocks have been built before."""
    found = KeyPyramid.empty(CONFIG, (BATCH, KEY_HEADS, DIM, TOKENS), kv.k)
    found.built.fill_(NEEDED - 1)
    found.extend(kv, rows, block_q, append=block_q == 1)
    assert found.built[-1, -1] >= NEEDED
    return found


@pytest.mark.parametrize("paged", [False, True])
def test_prompts(paged: bool) -> None:
    q, kv, rows = queries(), keys(paged), sequences()
    shape = (BATCH, KEY_HEADS, rows.blocks(CONFIG.block_q))
    selection = SelectionBuffers.empty(CONFIG, shape, q.device)
    selection.counts.zero_()
    select(
        q,
        pyramid(kv, rows, CONFIG.block_q).table,
        kv,
        rows,
        CONFIG,
        LOGITS,
        CONFIG.block_q,
        selection,
    )
    assert selection.counts[-1, -1, -1] == CONFIG.budget_blocks
    out, lse = torch.empty_like(q), tensor(BATCH, HEADS, ROWS, dtype=torch.float32)
    part = Part(rows, reads(rows.blocks(CONFIG.block_q)))
    prefill.prefill(Operands(q, kv, LOGITS, out, lse), part)
    assert lse[-1, -1, -1] > 0


@pytest.mark.parametrize("paged", [False, True])
def test_steps(paged: bool) -> None:
    q, kv, rows = queries(1), keys(paged), sequences(1, query_rows=1)
    selection = SelectionBuffers.empty(CONFIG, (BATCH, KEY_HEADS, 1), q.device, keep=True)
    select(q, pyramid(kv, rows, 1).table, kv, rows, CONFIG, LOGITS, 1, selection)
    assert selection.counts[-1, -1, -1] == CONFIG.budget_blocks
    read = Reads(
        1,
        CONFIG.block_k,
        CONFIG.sink,
        CONFIG.window,
        selection.indices,
        selection.counts,
        selection.window_start[:, -1],
    )
    out, lse, scratch = (
        torch.zeros_like(q),
        tensor(BATCH, HEADS, 1, dtype=torch.float32),
        DecodeScratch.make(2, q, DIM),
    )
    decode(Operands(q, kv, LOGITS, out, lse), Part(rows, read), scratch)
    assert scratch.lse[-1, -1, -1, -1] > 0


def test_dense_rows() -> None:
    """At a stride, and with their keys split, of sequences that begin late."""
    q, kv, rows = queries(), keys(), sequences(FEW, LATE)
    out, lse = torch.empty_like(q), tensor(BATCH, HEADS, ROWS, dtype=torch.float32)
    x, part = Operands(q, kv, LOGITS, out, lse), Part(rows, dense_reads())
    prefill.prefill(x, part, stride=2)
    decode(x, part, DecodeScratch.make(2, q, DIM))
    assert lse[-1, -1, -1] > 0


def test_gradients() -> None:
    q, kv, rows = queries(), keys(), sequences()
    read = reads(rows.blocks(CONFIG.block_q))
    read = replace(read, sink=0)  # every row reads the sink
    out, lse, part = (
        torch.empty_like(q),
        tensor(BATCH, HEADS, ROWS, dtype=torch.float32),
        Part(rows, read),
    )
    out[-1, -1, -1] = 1  # its own gradient as well
    grad_q, mean = torch.empty_like(q), torch.empty_like(lse)
    x = Operands(q, kv, LOGITS, out, lse)
    grid, arguments = query_gradient_arguments(x, part, out, lse, grad_q, mean, TILE)
    query_gradient_kernel[grid](**arguments)
    assert mean[-1, -1, -1] > 0
    tiles = TOKENS // TILE.keys
    entries = BATCH * KEY_HEADS * tiles
    lists = Inverted(
        *(tensor(entries, dtype=torch.int32) for _ in "ab"), tensor(entries + 1, dtype=torch.int64)
    )
    lists.who[-1], lists.what[-1] = rows.blocks(CONFIG.block_q) - 1, 1
    lists.offsets[-2], lists.offsets[-1] = entries - 1, entries
    grads = torch.empty_like(kv.k), torch.empty_like(kv.v)
    grid, passes = key_gradient_arguments(x, part, out, mean, *grads, lists, TILE)
    assert grid == (tiles, KEY_HEADS, BATCH)
    for arguments in passes:
        key_gradient_kernel[grid](**arguments)
    assert grads[1][-1, -1, -1].all()


def test_hyper_and_delta() -> None:
    x = example(DIM, DTYPE, tokens=TOKENS, device="cpu")
    x.q[0, -1, -1] = 1
    launches = [
        hash_launch(x, "sm90"),
        *square_launches(x, tile_of("hyper squares", "sm90", DIM, DIM, DTYPE)),
    ]
    launches[0].arguments["DIRECTIONS"].fill_(1)
    for launch in launches:
        for name in ("ROW_ORDER", "KEY_ORDER"):
            if name in launch.arguments:
                launch.arguments[name][:, -2 * FEW :] = TOKENS // 2 - 1
        launch.kernel[launch.grid](**launch.arguments)
    assert launches[0].arguments["CODES"][-1, -1] != 0
    assert x.lse[0, -1].any()
    out, lse, rows = queries(), tensor(BATCH, HEADS, ROWS, dtype=torch.float32), sequences()
    change = tensor(BATCH, HEADS, ROWS // 2 + 1, DIM, dtype=torch.float32)
    change[-1, -1, -1] = 1
    grid, arguments = spread_arguments(out, lse, change, change[..., 0], rows, 2)
    spread_kernel[grid](**arguments)
    assert out[-1, -1, -1].all()


@triton.jit
def narrow_offsets(page, slots, stride_batch, stride_token, PAGE_SIZE: tl.constexpr):
    return page.to(tl.int64) * stride_batch + slots * stride_token


@triton.jit
def wrapped_offsets(page, slots, stride_batch, stride_token, PAGE_SIZE: tl.constexpr):
    return (page.to(tl.int64) * stride_batch + slots.to(tl.int64) * stride_token).to(tl.int32)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [(narrow_offsets, "int32 overflow: multiply"), (wrapped_offsets, "out of range")],
)
def test_offsets_in_32_bits_are_found(
    offsets: Any, said: str, sanitizer: Sanitizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the attention of a prompt, whose keys are 4,096 numbers apart: half of them are beyond
    2**31."""
    monkeypatch.setattr(prefill, "offsets_in", offsets)
    kv = KeyValues(
        *(tensor(BATCH, TOKENS, 4 * KEY_HEADS, DIM)[:, :, :KEY_HEADS].transpose(1, 2) for _ in "kv")
    )
    q, part = queries(FEW), Part(sequences(FEW, LATE, FEW), dense_reads())
    x = Operands(q, kv, LOGITS, torch.empty_like(q))
    with pytest.raises(interpreter.InterpreterError, match=said):
        prefill.prefill(x, part)
    sanitizer.found.clear()
    monkeypatch.setattr(prefill, "offsets_in", offsets_in)
    prefill.prefill(x, part)


def test_programs_with_the_largest_offsets_run() -> None:
    assert last_of((6, 1, 2), 0) == [(5, 0, 1)]
    assert last_of((6, 1, 1), 3) == [(5, 0, 0), (3, 0, 0)]
