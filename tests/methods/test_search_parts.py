"""Parts of the tree search by themselves: scores from logits, gathering piece by piece, the sample
of the need, options; and that a call selects for each query block what it would select for it
alone."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import brute
import pytest
import torch
from helpers import assert_near, make_qkv, small
from tree_cases import check, selected
from with_rope import check_selection, positions

from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, Span, query_blocks
from hip_hf.methods import hip, need
from hip_hf.methods.hip import Options, Selector, TreeSearch
from hip_hf.methods.need import highest, sampled_chunks, sampled_keys
from hip_hf.methods.ranking import aggregate

pytestmark = pytest.mark.fast

LIMIT = torch.finfo(torch.float32).max


def plain_scores(
    logits: list[list[float]],
    score: str,
    softcap: float | None,
    missing: set[int],
    near: list[float] | None,
    size: int,
) -> list[float]:
    """Of one candidate after the other, from its logits of every row; -inf for those that are
    missing."""
    capped = [
        [x if softcap is None else softcap * math.tanh(x / softcap) for x in row] for row in logits
    ]
    count = len(logits[0]) // size
    found = []
    for candidate in range(count):
        own = range(candidate * size, (candidate + 1) * size)
        if candidate in missing:
            found.append(-math.inf)
        elif score == "max":
            found.append(max(row[i] for row in capped for i in own))
        else:
            shares = 0.0
            for r, row in enumerate(capped):
                whole = sum(math.exp(x) for i, x in enumerate(row) if i // size not in missing)
                whole += 0.0 if near is None else math.exp(near[r])
                shares += sum(math.exp(row[i]) for i in own) / whole
            found.append(shares)
    return found


def with_room(logits: torch.Tensor) -> torch.Tensor:
    """The logits with another column, which is written over."""
    return torch.nn.functional.pad(logits, (0, 1), value=torch.nan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("missing", [None, 2, 5])
@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("given", [{}, {"softcap": 1.5}, {"near": True}])
def test_scores_from_logits(
    given: dict[str, Any], score: str, missing: int | None, size: int, dtype: torch.dtype
) -> None:
    """`missing`: only the last `missing` of five candidates may be absent, and of those every other
    one is."""
    logits = (3 * torch.randn(2, 4, 5 * size, dtype=torch.float64)).to(dtype)
    near = (
        torch.randn(2, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        if "near" in given
        else None
    )
    absent = None if missing is None else [i % 2 == 0 for i in range(missing)]
    invalid = None if absent is None else torch.tensor(absent).repeat_interleave(size).expand(2, -1)
    gone = set() if absent is None else {5 - len(absent) + i for i, out in enumerate(absent) if out}
    known = logits.clone() if near is None else with_room(logits)
    got = aggregate(known, score, given.get("softcap"), invalid, near, size)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.tensor(
        [
            plain_scores(
                logits[n].tolist(),
                score,
                given.get("softcap"),
                gone,
                None if near is None else near[n].tolist(),
                size,
            )
            for n in range(2)
        ]
    )
    assert_near(
        got,
        want,
        1e-6 if dtype == torch.float64 else 3e-2 if "softcap" in given else 1e-5,
        "scores",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", ["mass", "max"])
def test_what_overflows_is_the_worst_or_the_best_but_there(score: str, dtype: torch.dtype) -> None:
    """Only who is absent has a score of -inf. The limits are those of fp32, in which scores are
    compared."""
    logits = torch.tensor([[0.0, torch.inf, -torch.inf, torch.nan, 1.0]], dtype=dtype)
    got = aggregate(logits, score, None, torch.tensor([True]))
    assert got[-1] == -torch.inf
    assert got[:-1].isfinite().all()
    if score == "max":
        assert got[:-1].tolist() == [0.0, LIMIT, -LIMIT, -LIMIT]
    else:
        assert got[:-1].tolist() == [-LIMIT] * 4, "no share of a sum that is no number"


def test_what_overflows_near_a_row_leaves_the_others_their_say() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    scores = aggregate(with_room(logits), "mass", None, None, torch.tensor([torch.inf, 0.0]))
    assert torch.equal(scores, aggregate(with_room(logits[1:]), "mass", None, None, torch.zeros(1)))
    nothing_near = torch.full((2,), -torch.inf)
    scores = aggregate(with_room(logits), "mass", None, None, nothing_near)
    assert torch.equal(scores, aggregate(logits.clone(), "mass", None, None))


def test_a_row_that_reads_all_it_needs_near_it_has_no_say() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    alone = aggregate(with_room(logits), "mass", None, None, torch.tensor([0.0, 0.0]))
    assert alone[0] > alone[1]
    busy = aggregate(with_room(logits), "mass", None, None, torch.tensor([50.0, 0.0]))
    assert busy[1] > busy[0]


# 51 rows are three whole query blocks and a short one; of one head, or of both heads at once
# (decode).
CALLS = [(51, 1), (1, 2)]


@pytest.mark.parametrize("most", [1, 2600, 11000])
@pytest.mark.parametrize(("rows", "heads"), CALLS)
@pytest.mark.parametrize("score", ["mass", "max"])
def test_what_is_gathered_piece_by_piece_selects_the_same(
    score: str, rows: int, heads: int, most: int, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`most` bytes at once: single query blocks and key blocks, five key blocks, or two query
    blocks; with a rest."""
    monkeypatch.setattr(hip, "GATHERED_AT_ONCE", most)
    check(small(rescore=4, budget=12, score=score), 131, rows, heads=heads)


@pytest.mark.parametrize("most", [1, 1600])
def test_pieces_of_an_extended_context(
    most: int, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hip, "GATHERED_AT_ONCE", most)
    config = small(block_q=8, budget=8, window=8, rescore=4)
    check_selection(config, 83, 2, positions(64, True))


# Calls of the search itself.


def make_search(
    config: HiPConfig, tokens: int, heads: int, where: Any = None
) -> tuple[TreeSearch, list[QueryBlock], Any]:
    """A search over random keys, the query blocks of a whole prompt that have something to select,
    and what their rows always read; None where rows vote by their place."""
    q, k, _ = make_qkv(tokens, heads=heads, dtype=torch.float64)
    selector = Selector(config)
    pyramid = selector.make_pyramid(q.dtype)
    pyramid.extend(k[0], tokens // config.block_k)
    search = selector.bind(q[0].unflatten(0, (heads, 2)), k[0], pyramid, 0.25, None)
    blocks = query_blocks(config, Span(0, 0, tokens, 0, tokens, 0), False)
    blocks = [block for block in blocks if block.num_candidates > config.budget_blocks]
    near = (
        torch.randn(heads, 2, sum(block.rows for block in blocks), dtype=q.dtype)
        if config.vote == "need"
        else None
    )
    return (search if where is None else search.chunk_indexed(where)), blocks, near


SEARCHES = [
    dict(),
    dict(rescore=4, score="max"),
    dict(group_shared=False, rescore=2, query_stride=8),
    dict(vote="sampled", query_stride=3),
    dict(options={"sample": 7}, query_stride=8),
]


@pytest.mark.parametrize("fields", SEARCHES)
@pytest.mark.parametrize("where", [None, positions(64, True)], ids=["plain", "extended"])
def test_together_as_alone(where: Any, fields: dict[str, Any]) -> None:
    """All query blocks of a prompt, from five start levels, and both heads in one call."""
    config = small(**{"budget": 8, "beam": 1, **fields})
    search, blocks, near = make_search(config, 299, 2, where)
    assert len({hip.start_level(config, block.low, block.high) for block in blocks}) == 5
    together = search.select(slice(0, 2), blocks, near)
    row = 0
    for i, block in enumerate(blocks):
        for head in range(2):
            own = None if near is None else near[head : head + 1, :, row : row + block.rows]
            alone = search.select(slice(head, head + 1), [block], own)
            assert torch.equal(together[head : head + 1, :, i : i + 1], alone), (i, head)
        row += block.rows


@pytest.mark.parametrize("fields", SEARCHES)
def test_tensors_are_made_where_the_queries_are(fields: dict[str, Any]) -> None:
    """Not on the default device."""
    search, blocks, near = make_search(small(**fields), 163, 1)
    want = search.select(slice(0, 1), blocks, near)
    with torch.device("meta"):
        got = search.select(slice(0, 1), blocks, near)
    assert torch.equal(got, want)


def watched_buffers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every buffer that searches take."""
    taken: list[tuple[str, tuple[int, ...]]] = []

    def take(name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        taken.append((name, tuple(shape)))
        return real(name, shape, like)

    real = hip.scratch.take
    for module in (hip, need):
        monkeypatch.setattr(module, "scratch", SimpleNamespace(take=take))
    return taken


@pytest.mark.parametrize(
    ("where", "unrotated"),
    [(None, set()), (positions(64, True), {"unrotated"})],
    ids=["plain", "extended"],
)
def test_all_stages_of_a_search_share_their_buffers(
    where: Any, unrotated: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker keeps does not add up over the levels, the need and the rescoring."""
    search, blocks, near = make_search(small(rescore=2, query_stride=8), 163, 1, where)
    taken = watched_buffers(monkeypatch)
    search.select(slice(0, 1), blocks, near)
    assert {name for name, _ in taken} == {"summaries", "logits", "picked"} | unrotated


# at once: summaries of query blocks, with 14 chunks of 2 * 16 numbers each; key blocks, of 4 * 16
# numbers
@pytest.mark.parametrize(
    ("most", "heads", "summaries", "keys"),
    [
        (1, 1, 1, 1),
        (5 * 512 + 511, 1, 1, 5),
        (2 * 14 * 256 + 255, 1, 2, 12),
        (1 << 20, 1, 3, 12),
        (1, 2, 1, 1),
        (1 << 20, 2, 3, 12),
    ],
)
def test_as_much_is_gathered_at_once_as_allowed(
    most: int, heads: int, summaries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least a query block, or a key block, of one head; of both heads where all fits (a decode
    step's few rows)."""
    search, blocks, near = make_search(small(rescore=4, budget=12), 131, heads)
    run = blocks[-4:-1]  # of one start level
    wanted = search.select(slice(0, heads), run, near[:, :, -51:-3])
    monkeypatch.setattr(hip, "GATHERED_AT_ONCE", most)
    taken = watched_buffers(monkeypatch)
    assert torch.equal(search.select(slice(0, heads), run, near[:, :, -51:-3]), wanted)
    pieces = [shape[:2] for name, shape in taken if name == "summaries"]
    each = heads if summaries == 3 else 1
    counts = [*[summaries] * (3 // summaries), *[3 % summaries] * (3 % summaries > 0)]
    assert pieces == [(each, count) for count in counts] * (heads // each)
    assert {math.prod(shape) // (heads * 64) for name, shape in taken if name == "picked"} == {keys}


def test_half_precision_selects_what_its_numbers_select() -> None:
    """It is multiplied in fp32 where that is faster, and always summed up so."""
    config = small(rescore=2, query_stride=8)
    q, k, v = (x.to(torch.float16) for x in make_qkv(163, 35))
    assert selected(config, q, k, v) == selected(config, q.float(), k.float(), v.float())


# The need.


@pytest.mark.parametrize("level", [0, 1, 3])
def test_the_sample_has_a_key_of_each_chunk(level: int) -> None:
    """Of key blocks 2 to 10; the key is its own position."""
    keys = torch.arange(100, dtype=torch.float16).view(2, 50, 1)
    got = sampled_keys(keys, *sampled_chunks(small(), 2, 11, level), level, torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, keys[:, brute.spread(8, 44, 1 << level)].float())


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_highest_logit_of_each_row(
    softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, keys = torch.randn(2, 3, 8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype)
    q[:, 0] *= 1000
    logits = (q @ keys.transpose(1, 2)).double()
    want = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).amax(-1)
    taken = watched_buffers(monkeypatch)
    got = highest(q, keys, softcap)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(got, want, 1e-9 if dtype == torch.float64 else 1e-5)
    assert taken == [("logits", (2, 3, 5))], "the logits are in the worker's buffer"


# Options.


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weight": -0.01}, "HiPConfig.options['weight']: got -0.01, allowed: 0 to 1"),
        ({"weight": 1.01}, "HiPConfig.options['weight']: got 1.01, allowed: 0 to 1"),
        ({"weight": True}, "HiPConfig.options['weight']: got True, allowed: 0 to 1"),
        ({"weight": "1"}, "HiPConfig.options['weight']: got '1', allowed: 0 to 1"),
        ({"sample": 1}, "HiPConfig.options['sample']: got 1, allowed: an integer >= 2"),
        ({"sample": 4.0}, "HiPConfig.options['sample']: got 4.0, allowed: an integer >= 2"),
    ],
)
def test_bad_options(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        Options(**values)
    assert (Options(weight=0, sample=2), Options(weight=1)) == (Options(0, 2), Options(1, 768))
