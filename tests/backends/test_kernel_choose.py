"""Searches of decode steps whose exact look several programs share (`selection/choose.py`), against
the torch search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import small
from selection_cases import Case, whole

from hip_hf.backends.triton.selection import search
from hip_hf.backends.triton.selection.search import MOST_LOOKS, looks_for, search_constants
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span

pytestmark = pytest.mark.kernels


def steps() -> list[Span]:
    """One row, of which the first sees a padded sequence; one whose candidates the budget covers;
    several rows; none."""
    return [whole(397, 1, 0, 5), whole(60, 1, 1), whole(331, 2, 2), Span(3, 0, 200, 0, 0, 200)]


def looks_of(case: Case) -> int:
    config = case.config
    looks = looks_for(len(case.spans), config.block_k, 132)
    call = (case.groups, 64, case.q.dtype, 1, 400, "sm90", True)
    return search_constants(config, *call, looks=looks)["LOOKS"]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("looks", "fields", "shape"), [
    (4, dict(), dict()), (4, dict(score="max"), dict()), (4, dict(vote="sampled"), dict()),
    (4, dict(decode_refresh=1), dict()), (4, dict(group_shared=False), dict(groups=3)),
    (4, dict(), dict(groups=20)), (3, dict(block_k=6, budget=18), dict(heads=2)),
    (4, dict(block_k=7, budget=21), dict(groups=5)), (8, dict(block_k=8, budget=16), dict(dim=80)),
    (4, dict(), dict(page_size=7)), (4, dict(), dict(dtype=torch.bfloat16)),
    (4, dict(rescore=5), dict(softcap=2.0, sliding=300, sinks=torch.ones(4), heads=2)),
    (4, dict(beam=16), dict()), (4, dict(beam=16, score="max"), dict(groups=20)),
    (4, dict(beam=12), dict(page_size=7)),
])  # fmt: skip
def test_the_same_blocks(looks: int, fields: dict[str, Any], shape: dict[str, Any]) -> None:
    """As the torch search, whatever the blocks' size; what lies in scratch before does not
    matter."""
    case = Case(small(**{"rescore": 3, **fields}), steps(), **shape)
    assert looks_of(case) == looks
    case.check(per_row=True, keep=True)


@pytest.mark.parametrize("fields", [dict(), dict(score="max")])
def test_a_search_that_is_not_shared_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """And leaves the same behind for the steps after it."""
    case = Case(small(rescore=3, **fields), steps(), heads=2)
    shared = case.run(1, case.empty(1, keep=True))
    monkeypatch.setattr(search, "MOST_LOOKS", 1)
    alone = case.run(1, case.empty(1, keep=True))
    for name in ("indices", "counts", "window_start", "made"):
        assert torch.equal(getattr(shared, name), getattr(alone, name)), name
    assert (shared.shared is None, alone.shared is None) == (False, True)


def test_a_shared_search_serves_until_it_is_as_old_as_decode_refresh() -> None:
    """Then its scratch is used again, and the new search finds other blocks."""
    found, scratch, into = [], set(), None
    for position in range(200, 205):
        torch.manual_seed(position)
        case = Case(small(rescore=2, decode_refresh=3), [Span(0, 0, position + 1, 0, 1, position)])
        into = case.run(1, case.empty(1, keep=True) if into is None else into)
        assert into.shared is not None
        found.append(into.indices.tolist())
        scratch.add(into.shared[1].data_ptr())
    assert found[0] == found[1] == found[2] != found[3] == found[4]
    assert len(scratch) == 1


def test_as_many_programs_as_a_device_runs_at_once() -> None:
    looks = {0: 8, 1: 8, 16: 8, 17: 4, 33: 4, 66: 2, 67: 1, 128: 1, 1000: 1}
    assert {programs: looks_for(programs, 16, 132) for programs in looks} == looks
    looks = {1: 1, 2: 2, 3: 2, 4: 4, 5: 3, 6: 3, 7: 4, 9: 5, 64: 8}
    assert {block_k: looks_for(1, block_k, 132) for block_k in looks} == looks


@pytest.mark.parametrize(
    ("fields", "stateful"), [(dict(rescore=1), True), (dict(coarsest=4), True), (dict(), False)]
)
def test_what_is_not_shared(fields: dict[str, Any], stateful: bool) -> None:
    """A search without an exact look, one whose start level goes through scratch, and those of
    prompts."""
    config = small(**{"rescore": 3, **fields})
    shape = (config, 2, 64, torch.float32, 1, 4096, "sm90", stateful)
    assert search_constants(*shape, looks=MOST_LOOKS)["LOOKS"] == 1
    assert (
        search_constants(small(rescore=3), *shape[1:-1], True, looks=MOST_LOOKS)["LOOKS"]
        == MOST_LOOKS
    )


def test_scratch_of_a_shared_search_is_small() -> None:
    """Of the default settings with 8 key heads and 4 query heads for each."""
    config, shape = HiPConfig(dense_below=0), dict(heads=8, groups=4, dim=16)
    case = Case(config, [whole(6000, 1)], dtype=torch.bfloat16, **shape)
    kept = case.run(1, case.empty(1, keep=True)).shared
    assert kept is not None
    assert sum(x.nbytes for x in kept) == 8 * 4 * (256 + 8 * 513 * 4)
