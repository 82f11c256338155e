"""The selection kernel against the torch search (`methods/hip.py`) on the same pyramid: the same
blocks, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from helpers import assert_near, small
from interpreter import DEVICE
from selection_cases import Case, whole

from hip_hf.backends.triton.selection import search
from hip_hf.backends.triton.selection.scoring import chunk_logits
from hip_hf.backends.triton.selection.search import unsupported_search
from hip_hf.backends.triton.selection.select import select_kernel
from hip_hf.backends.triton.selection.voting import Voting
from hip_hf.config import REPRESENTATIVES, HiPConfig
from hip_hf.geometry import Span

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize(
    ("representative", "score"),
    [*((name, "mass") for name in REPRESENTATIVES), ("blend", "max"), ("middle", "max")],
)
def test_every_representative_and_score(representative: str, score: str) -> None:
    Case(small(representative=representative, score=score), [whole(331, 21)]).check()


@pytest.mark.parametrize(
    ("groups", "shared"), [(1, True), (4, False), (7, True), (7, False), (8, True)]
)
def test_groups(groups: int, shared: bool) -> None:
    Case(small(group_shared=shared), [whole(283, 17)], groups=groups).check()


@pytest.mark.parametrize(
    ("groups", "fields"),
    [(7, {}), (8, {}), (8, dict(options={"descent": 8})), (7, dict(coarsest=4, beam=4))],
)
def test_fewer_tiles_of_votes_walk_than_look(groups: int, fields: dict[str, Any]) -> None:
    case = Case(small(rescore=3, query_stride=3, **fields), [whole(683, 35)], groups=groups)
    voting = Voting.of(case.config, groups, case.config.block_q, False)
    assert voting.walkers < voting.votes > 16
    case.check()


@pytest.mark.parametrize("fields", [
    dict(beam=1), dict(beam=3), dict(rescore=2), dict(rescore=8, beam=2),
    dict(rescore=3, score="max"), dict(query_stride=1), dict(query_stride=2),
    dict(query_stride=2, block_q=5, group_shared=False), dict(query_stride=5),
    dict(query_stride=40), dict(query_stride=40, score="max"),
    dict(query_stride=5, vote="sampled"), dict(query_stride=5, options={"sample": 7}),
    dict(rescore=4, query_stride=4, options={"onward": 0, "descent": 3}),
    dict(rescore=4, query_stride=4, options={"onward": 1, "descent": 1}),
    dict(query_stride=4, vote="sampled", score="max"), dict(block_k=1, budget=4),
    dict(block_k=6, budget=18, beam=1, rescore=2), dict(sink=0, window=0),
])  # fmt: skip
def test_settings_of_the_search(fields: dict[str, Any]) -> None:
    Case(small(**fields), [whole(299, 19)]).check()


@pytest.mark.parametrize(("fields", "shape"), [
    (dict(), dict()), (dict(score="max"), dict()), (dict(vote="sampled"), dict()),
    (dict(group_shared=False), dict()), (dict(query_stride=1), dict(groups=7)),
    (dict(query_stride=8), dict(groups=3)), (dict(coarsest=4, beam=4), dict()),
    (dict(block_k=6, budget=18), dict(page_size=7)), (dict(), dict(dim=80, dtype=torch.float16)),
    (dict(beam=20), dict(softcap=2.0, sliding=200, sinks=torch.ones(2))),
])  # fmt: skip
def test_few_candidates_are_looked_at_whole(fields: dict[str, Any], shape: dict[str, Any]) -> None:
    """Of one call, some; in a second sequence, which is padded, all."""
    config, spans = (
        small(**{"rescore": 3, "beam": 5, **fields}),
        [whole(299, 299), whole(130, 19, 1, 13)],
    )
    case = Case(config, spans, **shape)
    counts = [block.num_candidates for span in spans for block in case.blocks(span, False)]
    searched = [count for count in counts if count > case.selector.budget]
    assert min(searched) <= 2 * config.beam_blocks
    case.check()


@pytest.mark.parametrize(
    ("coarsest", "fields"),
    [(4, dict()), (16, dict()), (4, dict(score="max")), (16, dict(rescore=4))],
)
def test_a_start_level_longer_than_a_tile(coarsest: int, fields: dict[str, Any]) -> None:
    Case(small(coarsest=coarsest, **fields), [whole(2311, 3)]).check()


class Launches:
    """Stands in for the kernel; keeps the grid and the scratch's bytes of each launch."""

    def __init__(self) -> None:
        self.found: list[tuple[tuple[int, ...], int]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **fields: Any) -> None:
            self.found.append((grid, arguments[5].nbytes))
            select_kernel[grid](*arguments, **fields)

        return launch


@pytest.mark.parametrize(("keep", "programs"), [(False, 1), (False, 5), (True, 2)])
def test_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch, keep: bool, programs: int) -> None:
    """With scratch for fewer programs than there are, the search is several launches that find the
    same."""
    spans = [whole(400, 1), whole(517, 1, 1)] if keep else [whole(400, 40), whole(517, 37, 1, 3)]
    case = Case(small(coarsest=8, block_k=4, beam=1), spans, heads=2)
    block_q = 1 if keep else case.config.block_q
    whole_launch = case.run(block_q, case.empty(block_q, keep))
    launches, bound = Launches(), programs * (520 // 8) * 4
    monkeypatch.setattr(search, "select_kernel", launches)
    monkeypatch.setattr(search, "MOST_SCRATCH", bound)
    got = case.run(block_q, case.empty(block_q, keep))
    for name in ("indices", "counts", "window_start"):
        assert torch.equal(getattr(got, name), getattr(whole_launch, name)), name
    total = got.counts.numel()
    assert [grid for grid, _ in launches.found] == [
        (min(programs, total - i), 1) for i in range(0, total, programs)
    ]
    assert len(launches.found) > 1
    assert all(size <= bound * (2 if keep else 1) for _, size in launches.found), (
        "room to grow is a factor of two at most"
    )


def test_steps_share_their_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a sequence grows its steps allocate scratch anew only when that doubles."""
    config, launches, kept = small(coarsest=4, beam=1, decode_refresh=1), Launches(), set()
    monkeypatch.setattr(search, "select_kernel", launches)
    step = lambda position: Case(config, [Span(0, 0, position + 1, 0, 1, position)])  # noqa: E731
    into = step(200).empty(1, keep=True)
    for position in range(300, 420, 7):
        step(position).run(1, into)
        assert into.scratch is not None
        kept.add(into.scratch.data_ptr())
    assert {size for _, size in launches.found} == {128 * 4}
    assert len(kept) == 1


@triton.jit
def logits_kernel(table, rows, q, out, M: tl.constexpr, DIM: tl.constexpr):
    inner = tl.arange(0, M)
    at, offsets = tl.load(rows + inner), (inner * DIM).to(tl.int64)
    found = chunk_logits(
        table, at, q, offsets, 1.0, 1, 0.0, M, M, DIM, DIM, 1, "ieee", inner, q, q, 0
    )
    tl.store(out + inner[:, None] * M + inner[None, :], found)


def test_a_table_of_more_than_4_billion_numbers() -> None:
    """Rows beyond what 32 bits count; the memory between them is never touched."""
    m, dim = 16, 64
    far = 2**32 // dim
    table = torch.empty(far + m, dim, dtype=torch.float16, device=DEVICE)
    table[:m], table[far:] = torch.randn(2, m, dim)
    rows = torch.cat([torch.arange(m // 2), far + torch.arange(m // 2)]).int().to(DEVICE)
    q, out = torch.randn(m, dim).half().to(DEVICE), torch.full((m, m), torch.nan, device=DEVICE)
    logits_kernel[(1,)](table, rows, q, out, M=m, DIM=dim)
    assert_near(out.cpu(), (table[rows.long()].double() @ q.double().T).cpu(), 1e-4)


@pytest.mark.parametrize("dim", [24, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int) -> None:
    Case(small(rescore=2), [whole(251, 9)], dim=dim).check()


def test_sequences_of_any_length_padding_and_position() -> None:
    second = [Span(1, 3, 100, 5, 12, 90), Span(1, 100, 180, 12, 17, 75)]
    spans = [whole(151, 20, 0, 11), *second, Span(2, 0, 160, 0, 0, 160)]
    Case(small(rescore=2), spans, heads=2, groups=1).check()


@pytest.mark.fast
@pytest.mark.parametrize("page_size", [16, 7])
def test_pages(page_size: int) -> None:
    spans = [whole(153, 10, 0, 3), whole(130, 10, 1, 0)]
    Case(small(rescore=3), spans, page_size=page_size, heads=2, groups=1).check()


@pytest.mark.parametrize("per_row", [False, True])
def test_softcap_sliding_window_and_sinks(per_row: bool) -> None:
    spans, features = [whole(300, 3 if per_row else 20)], dict(softcap=2.0, sliding=200)
    sinks = torch.randn(4) + 3
    case = Case(small(rescore=2, query_stride=4), spans, sinks=sinks, heads=2, **features)
    case.check(per_row)


def test_decode_rows_select_for_themselves() -> None:
    Case(small(rescore=2), [whole(300, 3), whole(251, 2, 1, 5)], groups=3).check(per_row=True)


@pytest.mark.parametrize(
    "fields", [dict(), dict(rescore=2), dict(beam=4, score="max"), dict(coarsest=4)]
)
def test_a_decode_selection_that_serves_other_steps_is_no_other_one(fields: dict[str, Any]) -> None:
    """Of several rows and of one, with state."""
    for refresh in (1, 8):
        config = small(budget=32, decode_refresh=refresh, **fields)
        Case(config, [whole(400, 2), whole(390, 1, 1)]).check(per_row=True, keep=True)


def test_many_candidates_and_rows_in_several_tiles() -> None:
    Case(small(budget=64, beam=8, block_q=32, query_stride=1), [whole(2200, 8)], groups=5).check()


def test_ties_go_to_the_lower_position() -> None:
    case = Case(small(score="max", rescore=2), [whole(300, 20)])
    case.k[:] = 1.0
    case.q[..., 1:] = 0.0  # a sum of several numbers depends on how a product goes through them
    case.check()


def test_a_selection_serves_until_it_is_as_old_as_decode_refresh() -> None:
    config = small(decode_refresh=3)
    step = lambda position: Case(config, [Span(0, 0, position + 1, 0, 1, position)])  # noqa: E731
    torch.manual_seed(1)
    into = step(200).empty(1, keep=True)
    found = []
    for position in range(200, 205):
        torch.manual_seed(position)  # other keys at every step: a new search finds other blocks
        found.append(step(position).run(1, into).indices.tolist())
    assert found[0] == found[1] == found[2] != found[3] == found[4]
    torch.manual_seed(7)
    assert step(190).run(1, into).indices.tolist() != found[4], (
        "a position before the selection's own selects anew"
    )


def test_what_the_kernel_cannot_do_is_said() -> None:
    assert not unsupported_search(HiPConfig())
    assert "beam * budget" in unsupported_search(HiPConfig(budget=16384, beam=4))
