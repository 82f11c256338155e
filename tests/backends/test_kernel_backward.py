"""The backward kernels against the torch reference on the same block indices: interpreted, or
native on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from backward_cases import one_prompt, operands, reference, run
from helpers import assert_near
from interpreter import DEVICE
from kernel_cases import make_case, spans_of

from hip_hf.backends.triton.attention.backward import (
    Inverted,
    KeyTiles,
    attend_with_gradients,
    invert,
)
from hip_hf.backends.triton.common.arguments import Logits, Part, dense_reads
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.backends.triton.common.tuning import Tile
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("groups", "dtype"),
    [
        (1, torch.float32),
        (2, torch.bfloat16),
        (4, torch.float32),
        (4, torch.float16),
        (7, torch.float32),
        (8, torch.bfloat16),
    ],
)
def test_query_heads_of_a_group_and_dtypes(groups: int, dtype: torch.dtype) -> None:
    run(make_case(spans_of((0, 101, 101)), groups=groups, dtype=dtype))


@pytest.mark.parametrize(
    ("dim", "dv"), [(80, 80), (96, 64), (128, 128), (192, 128), (192, 192), (256, 256), (16, 40)]
)
def test_head_dims(dim: int, dv: int) -> None:
    run(one_prompt(dim, dv))


@pytest.mark.parametrize("shared", [True, False])
def test_padding_packing_and_a_cache(shared: bool) -> None:
    spans = [Span(0, 0, 150, 0, 60, 90), Span(1, 37, 110, 0, 20, 53), Span(1, 115, 150, 25, 60, 0)]
    run(make_case(spans, shared=shared, tokens=153))


@pytest.mark.parametrize(
    "fields",
    [
        dict(softcap=2.0),
        dict(sliding_window=70),
        dict(sinks=True),
        dict(softcap=3.0, sliding_window=25, sinks=True),
    ],
)
def test_logits(fields: dict[str, Any]) -> None:
    # many sinks: of a few gradients the largest rounding error is a matter of luck
    sinks = {"sinks": torch.randn(16), "groups": 8} if fields.get("sinks") else {}
    run(make_case(spans_of((0, 121, 100)), **{**fields, **sinks}))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(block_q=64, sink=0, window=0),
        dict(block_q=7, block_k=4, sink=3, window=9),
        dict(block_q=150, block_k=16),
        dict(block_k=1, most=9),
        dict(block_k=5, sink=7, window=11),
        dict(sink=400),
        dict(block_k=128, most=1),
        dict(block_k=70, most=2),  # three tiles a block, the last of fewer keys
        dict(block_k=96, most=2, dtype=torch.bfloat16),
    ],
)
def test_block_sizes(sizes: dict[str, Any]) -> None:
    run(
        make_case(
            spans_of((0, 301 if sizes.get("block_k", 1) >= 70 else 101, 87)), heads=1, **sizes
        ),
        need_lse=False,
    )


@pytest.mark.parametrize("block_k", [1, 5, 16, 64, 65, 100, 128, 256, 1000])
@pytest.mark.parametrize("most", [32, 64])
def test_tiles_of_keys_are_bounded(block_k: int, most: int) -> None:
    """However large key blocks are: more keys would spill. Every key is in one tile, and no tile is
    empty."""
    tiles = KeyTiles.of(block_k, Tile(64, most, 8, 1))
    assert tiles.keys <= most
    assert tiles.blocks == 1 or tiles.parts == 1
    assert (tiles.parts - 1) * tiles.keys < tiles.blocks * block_k <= tiles.parts * tiles.keys


def test_dense_rows_at_the_end_of_a_prompt() -> None:
    """Two parts: rows that select, and a dense tail. As if the tail's rows had selected
    everything."""
    case = make_case(spans_of((0, 150, 150)), heads=1, most=9, block_q=10)
    head, tail = (
        replace(case.spans[0], row_end=110),
        replace(case.spans[0], row_start=110, position=110),
    )
    for i, block in enumerate(case.blocks(case.spans[0])):
        if block.first >= 110:
            case.counts[:, :, i] = block.num_candidates
            case.indices[:, :, i, : block.num_candidates] = torch.arange(
                block.low, block.high
            ).int()
    device = torch.device(DEVICE)
    parts = (
        Part(Sequences.of([head], device), case.reads()),
        Part(Sequences.of([tail], device), dense_reads()),
    )
    inputs = [x.to(DEVICE, copy=True).requires_grad_() for x in (case.q, case.k, case.v)]
    grad_out = torch.randn(case.q.shape)
    out, _ = attend_with_gradients(operands(inputs, case.logits()), parts, HiPConfig())
    got = torch.autograd.grad((out * grad_out.to(DEVICE)).sum(), inputs)
    for name, a, b in zip("qkv", got, reference(case, grad_out, None), strict=True):
        assert_near(a.cpu(), b, 1e-4, f"gradient of {name}")


def test_gradients_repeat_bit_by_bit() -> None:
    case = make_case(spans_of((0, 101, 101)), dtype=torch.bfloat16)
    inputs = [x.to(DEVICE, copy=True).requires_grad_() for x in (case.q, case.k, case.v)]
    found = []
    for _ in range(2):
        out, _ = attend_with_gradients(operands(inputs, case.logits()), (case.part(),), HiPConfig())
        found.append(torch.autograd.grad(out.float().square().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_what_asks_gets_gradients() -> None:
    case = make_case(spans_of((0, 60, 60)))
    v = case.v.to(DEVICE, copy=True).requires_grad_()
    x = operands([case.q.to(DEVICE), case.k.to(DEVICE), v], Logits(case.scale))
    out, _ = attend_with_gradients(x, (case.part(),), HiPConfig())
    out.sum().backward()
    assert v.grad.isfinite().all()


@pytest.mark.parametrize("per_tile", [1, 3, 4])
def test_inverted_lists_hold_every_selection_once(per_tile: int) -> None:
    case = make_case(spans_of((0, 300, 300), (20, 140, 140)), shared=False, most=8, rows=300)
    tiles = -(-20 // per_tile)
    found: Inverted = invert(case.indices.to(DEVICE), case.counts.to(DEVICE), per_tile, tiles)
    sequences, lists, blocks, _ = case.indices.shape
    got = set()
    for i in range(sequences * lists * tiles):
        begin, end = found.offsets[i : i + 2].tolist()
        who = found.who[begin:end]
        assert (who.diff() > 0).all(), "query blocks are not in order, or stand twice"
        for block, bits in zip(who.tolist(), found.what[begin:end].tolist(), strict=True):
            assert bits
            got |= {
                (i // tiles, block, i % tiles * per_tile + j)
                for j in range(per_tile)
                if bits >> j & 1
            }
    want = set()
    for at in range(sequences):
        for one in range(lists):
            for block in range(blocks):
                chosen = case.indices[at, one, block, : case.counts[at, one, block]].tolist()
                want |= {(at * lists + one, block, j) for j in chosen}
    assert got == want
