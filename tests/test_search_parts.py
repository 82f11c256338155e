"""Parts of the tree search by themselves: scores from logits, gathering piece by piece, the successors of the best, options."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from helpers import assert_near, small
from test_extension import check_selection, positions
from test_tree_search import check

from hip_hf.methods import hip
from hip_hf.methods.hip import NO_CHUNK, Options, Selector, aggregate, best

LIMIT = torch.finfo(torch.float32).max


def plain_scores(
    logits: list[list[float]], score: str, softcap: float | None, missing: set[int], near: list[float] | None, size: int
) -> list[float]:
    """Of one candidate after the other, from its logits of every row; -inf for those that are missing."""
    capped = [[x if softcap is None else softcap * math.tanh(x / softcap) for x in row] for row in logits]
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("missing", [None, 2, 5])
@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("given", [{}, {"softcap": 1.5}, {"near": True}])
def test_scores_from_logits(given: dict[str, Any], score: str, missing: int | None, size: int, dtype: torch.dtype) -> None:
    """`missing`: only the last so many of five candidates may be absent, and of those every other one is."""
    logits = (3 * torch.randn(2, 4, 5 * size, dtype=torch.float64)).to(dtype)
    near = torch.randn(2, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32) if "near" in given else None
    absent = None if missing is None else [i % 2 == 0 for i in range(missing)]
    invalid = None if absent is None else torch.tensor(absent).repeat_interleave(size).expand(2, -1)
    gone = set() if absent is None else {5 - len(absent) + i for i, out in enumerate(absent) if out}
    got = aggregate(logits.clone(), score, given.get("softcap"), invalid, near, size)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.tensor(
        [
            plain_scores(logits[n].tolist(), score, given.get("softcap"), gone, None if near is None else near[n].tolist(), size)
            for n in range(2)
        ]
    )
    assert_near(got, want, 1e-6 if dtype == torch.float64 else 3e-2 if "softcap" in given else 1e-5, "scores")


@pytest.mark.parametrize("score", ["mass", "max"])
def test_what_overflows_is_the_worst_or_the_best_but_there(score: str) -> None:
    """Only who is absent has a score of -inf."""
    logits = torch.tensor([[0.0, torch.inf, -torch.inf, torch.nan, 1.0]])
    got = aggregate(logits, score, None, torch.tensor([True]))
    assert got[-1] == -torch.inf
    assert got[:-1].isfinite().all()
    if score == "max":
        assert got[:-1].tolist() == [0.0, LIMIT, -LIMIT, -LIMIT]
    else:
        assert got[:-1].tolist() == [-LIMIT] * 4, "no share of a sum that is no number"


def test_a_row_that_reads_all_it_needs_near_it_has_no_say() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    alone = aggregate(logits.clone(), "mass", None, None, torch.tensor([0.0, 0.0]))
    assert alone[0] > alone[1]
    busy = aggregate(logits.clone(), "mass", None, None, torch.tensor([50.0, 0.0]))
    assert busy[1] > busy[0]


@pytest.mark.parametrize("most", [1, 1000, 3000])
@pytest.mark.parametrize("rows", [1, 35])
@pytest.mark.parametrize("score", ["mass", "max"])
def test_what_is_gathered_piece_by_piece_selects_the_same(
    score: str, rows: int, most: int, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`most` bytes at once: single query blocks and key blocks, or a few with a rest."""
    monkeypatch.setattr(hip, "GATHERED_AT_ONCE", most)
    config = small(rescore=4, budget=12, score=score)
    check(config, 163, rows)
    check(config, 163, rows, heads=1)


@pytest.mark.parametrize("most", [1, 1000])
def test_pieces_of_an_extended_context(most: int, poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hip, "GATHERED_AT_ONCE", most)
    config = small(block_q=8, budget=16, window=8, rescore=4)
    check_selection(config, 163, 3, positions(64, True))


def test_successors_take_the_first_places() -> None:
    """Of the best two: 4's is there already, 7's is not. 9 is the last before the window: its successor is outside."""
    config = small(decode_refresh=8)
    search = Selector(config).bind(*(torch.empty(1, 1, 1, 4), torch.empty(1, 10, 4)), None, 1.0, None)  # type: ignore[arg-type]
    ids = torch.tensor([[[2, 4, 5, 7, NO_CHUNK]], [[2, 9, 5, 1, NO_CHUNK]]])
    scores = torch.tensor([[[1.0, 9.0, 2.0, 8.0, -torch.inf]], [[1.0, 9.0, 8.0, 2.0, -torch.inf]]])
    new_scores, new_ids = search._with_successors(scores, ids, torch.tensor([10]), 2)
    taken = [sorted(best(new_scores[n, 0], new_ids[n, 0], 2).tolist()) for n in range(2)]
    assert taken[0] == [5, 8]
    assert taken[1] == [6, 9], "one successor, and the best of all"
    for n in range(2):
        real = [i for i, s in zip(new_ids[n, 0].tolist(), new_scores[n, 0].tolist(), strict=True) if s > -math.inf]
        assert len(real) == len(set(real)), "none twice"
        assert NO_CHUNK not in real


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
    assert Options(weight=0, sample=2) == Options(0, 2)
