"""The kernels of votes by need (`votes.py`) against float64, written down from the description:
what every row finds near, how much it needs the candidates, and which rows vote."""

from __future__ import annotations

import math
from typing import Any

import brute
import pytest
import torch
from helpers import assert_near, small
from interpreter import DEVICE
from kernel_cases import precisions
from selection_cases import Case, whole
from with_rope import positions

from hip_hf.backends.triton.selection.votes import need_arguments, need_kernel, select_votes
from hip_hf.backends.triton.selection.voting import Voting
from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, Span

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]


def rotated(q: torch.Tensor, distance: torch.Tensor, case: Case) -> torch.Tensor:
    """Queries `[H, rows, D]` rotated by `distance` `[rows, keys]`, as they meet each un-rotated
    key: `[H, rows, keys, D]`."""
    assert case.positions is not None
    rope = case.positions.rope
    half = rope.dim // 2
    wide = torch.promote_types(q.dtype, torch.float32)  # angles of half precision are no angles
    angles = distance[..., None].to(wide) * rope.inv_freq.to(wide)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    q = q[:, :, None].expand(*q.shape[:2], distance.shape[1], -1)
    a, b, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
    return torch.cat(
        [(a * cos - b * sin) * rope.scaling**2, (b * cos + a * sin) * rope.scaling**2, rest], dim=-1
    )


def logits_of(
    case: Case,
    span: Span,
    block: QueryBlock,
    at: torch.Tensor,
    distance: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Logits `[Hq, rows, keys]` of a query block for the keys at positions `at`; `distance`: how
    far each is counted to be, if that is not its true distance."""
    row = span.row_start + block.row
    q = case.q[span.batch, :, row : row + block.rows].to(dtype)
    keys = case.keys(span)[:, at].to(dtype).repeat_interleave(case.groups, 0)
    if distance is None:
        logits = q @ keys.transpose(-1, -2)
    else:
        logits = (rotated(q, distance, case) * keys[:, None]).sum(-1)
    logits = logits * case.scale
    return logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)


def reference(
    case: Case, span: Span, block: QueryBlock, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """near and need `[Hq, rows]` of a query block, computed in `dtype`."""
    bk, trained = case.config.block_k, case.positions.trained if case.positions else 0
    row = torch.arange(block.first, block.last + 1)[:, None]
    sink, window = range(block.start, block.sink_end), range(block.window_start, block.last + 1)
    at = torch.tensor([*sink, *window])
    left_out = (block.num_candidates - case.config.budget // bk) * bk
    places = (row - at - (at < block.sink_end) * left_out).clamp(max=trained - 1)
    logits = logits_of(case, span, block, at, places if case.positions else None, dtype)
    seen = (at <= row) & (at > row - (case.sliding or span.keys))
    logits = logits.masked_fill(~seen, -torch.inf)
    if case.sinks is not None:
        sinks = case.sinks.to(dtype)[:, None, None].expand(*logits.shape[:2], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    near = logits.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1)
    most = case.config.method_options().sample
    sample = brute.sampled_keys(block.low * bk, block.high * bk, most)
    distance = (row + 1 - block.window_start).clamp(max=trained - 1).expand(-1, len(sample))
    at = torch.tensor(sample)
    logits = logits_of(case, span, block, at, distance if case.positions else None, dtype)
    return near, logits.to(near.dtype).amax(-1) - near


def needs(
    case: Case, block_q: int, made: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel writes into near and need, over NaN."""
    q, _, kv, sequences = case.arguments()
    shape = (sequences.count, q.shape[1], sequences.max_rows)
    near, need = (torch.full(shape, torch.nan, device=DEVICE) for _ in range(2))
    call = (sequences, case.config, case.logits(), block_q, made, near, need)
    grid, arguments = need_arguments(q, kv, *call)
    need_kernel[grid](**arguments)
    return near.cpu(), need.cpu()


def voted(case: Case, block_q: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """The votes that the kernels cast, and how much each finds near."""
    q, _, kv, sequences = case.arguments()
    votes, near = select_votes(q, kv, sequences, case.config, case.logits(), block_q)
    return votes.cpu(), near.cpu()


def who_votes(need: torch.Tensor, config: HiPConfig, block: QueryBlock) -> list[tuple[int, int]]:
    """The rows and heads of a query block that vote, of need `[heads, rows]`: as (row, head), in
    order, those that walk the tree first."""
    heads, rows = need.shape
    ids = [(row, head) for row in brute.asked(config, rows) for head in range(heads)]
    count = heads if rows == 1 else brute.most_votes(config, heads, block.low, block.high)
    if count >= len(ids):
        return ids
    ids = sorted(ids, key=lambda i: (-need[i[1], i[0]], i))
    walking = (
        count
        if brute.looked_at_whole(config, block.low, block.high)
        else brute.walkers(config, count)
    )
    return sorted(ids[:walking]) + sorted(ids[walking:count])


def check(case: Case, ranks_exactly: bool = True) -> None:
    """near and need are as exact as PyTorch in the same dtype, and who needs most votes.
    `ranks_exactly`: by what float64 says, else by what the kernel found."""
    config, block_q = case.config, case.config.block_q
    voting = Voting.of(config, case.groups, block_q, case.positions is not None)
    near, need = needs(case, block_q)
    votes, found = voted(case, block_q)
    written, cast = (torch.zeros(x.shape, dtype=torch.bool) for x in (near, found))
    errors: dict[str, list[float]] = {"near": [], "need": []}
    plain: dict[str, list[float]] = {"near": [], "need": []}
    searched = 0
    for s, span in enumerate(case.spans):
        for n, block in enumerate(case.blocks(span, False)):
            if block.num_candidates <= config.budget // config.block_k:
                continue
            searched += 1
            asked = torch.tensor(brute.asked(config, block.rows))
            rows = slice(block.first - span.position, block.last + 1 - span.position)
            written[s, :, block.first - span.position + asked] = True
            exact, rough = reference(case, span, block, torch.float64), []
            for precision in precisions(case.q, case.q.shape[-1]):
                with precision:
                    rough.append(reference(case, span, block, case.q.dtype))
            estimated = len(who_votes(exact[1], config, block)) < exact[1][:, asked].numel()
            got = (near[s, :, rows], need[s, :, rows])
            for name, mine, want, *same in zip(errors, got, exact, *rough, strict=True):
                if name == "near" or estimated:
                    least = torch.finfo(torch.float32).eps * float(want.abs().max())
                    errors[name].append(float((mine.double() - want)[:, asked].abs().max()))
                    plain[name].append(
                        max(least, *(float((one.double() - want).abs().max()) for one in same))
                    )
            ranks = exact[1] if ranks_exactly else got[1].double()
            for mask_head in range(votes.shape[1]):
                own = slice(mask_head * voting.members, (mask_head + 1) * voting.members)
                chosen = who_votes(ranks[own], config, block)
                at = slice(n * voting.slots, n * voting.slots + len(chosen))
                cast[s, mask_head, at] = True
                want = torch.stack([got[0][own][head, row] for row, head in chosen])
                assert torch.equal(found[s, mask_head, at], want)
                if case.positions is None:
                    queries = case.q[span.batch, own, span.row_start + block.row :]
                    want = torch.stack([queries[head, row] for row, head in chosen])
                    assert torch.equal(votes[s, mask_head, at], want)
    assert searched
    for name, worst in errors.items():
        allowed = 2 * max(plain[name], default=0)
        assert max(worst, default=0) <= allowed, (name, max(worst), allowed)
    assert near[~written].isnan().all(), "rows that search nothing were written"
    if voting.ranked:
        assert need[~written].isnan().all()
    assert votes[~cast].isnan().all(), "votes that are not cast were written"


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("rows", [5, 16, 45])
def test_prompts(rows: int, groups: int, shared: bool, poison: None) -> None:
    """Partial first and last blocks, of which some have fewer rows than votes."""
    config = small(query_stride=4, group_shared=shared)
    check(Case(config, [whole(131, rows)], groups=groups))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fields", [dict(), dict(softcap=3.0), dict(sliding=70), dict(sinks=True)])
@pytest.mark.parametrize("shared", [True, False])
def test_dtypes_and_logits(
    shared: bool, fields: dict[str, Any], dtype: torch.dtype, poison: None
) -> None:
    sinks = torch.randn(6) + 2 if fields.get("sinks") else None
    fields = {name: value for name, value in fields.items() if name != "sinks"}
    config, shape = small(query_stride=5, group_shared=shared), dict(heads=2, groups=3, dim=64)
    check(Case(config, [whole(163, 37)], dtype=dtype, sinks=sinks, **shape, **fields))


@pytest.mark.parametrize("dim", [24, 80, 96, 256])
def test_head_dims(dim: int, poison: None) -> None:
    check(Case(small(query_stride=4), [whole(120, 21)], dim=dim))


@pytest.mark.parametrize("fields", [
    dict(block_q=7, query_stride=3), dict(query_stride=16), dict(query_stride=1000),
    dict(query_stride=3), dict(sink=0, window=0), dict(sink=9, window=5),
    dict(block_k=6, budget=12), dict(options={"sample": 2}), dict(options={"sample": 5}),
    dict(score="max"),
])  # fmt: skip
def test_settings(fields: dict[str, Any], poison: None) -> None:
    case = Case(small(**{"query_stride": 4, **fields}), [whole(151, 29)], groups=3)
    if case.config.score == "mass":
        check(case)
        return
    by_mass = Case(small(query_stride=4), case.spans, groups=3)
    by_mass.q, by_mass.k = case.q, case.k
    votes, wanted = (voted(one)[0] for one in (case, by_mass))
    count = 12 * 2  # the two full blocks at the end
    assert torch.equal(votes[:, :, -count:], wanted[:, :, -count:]), (
        "who votes does not depend on the score"
    )


@pytest.mark.parametrize("stride", [3, 4, 8])
@pytest.mark.parametrize("where", [None, positions(48)])
def test_more_rows_vote_where_the_candidates_are_looked_at_whole(
    where: Any, stride: int, poison: None
) -> None:
    """In one call, where there are up to 16 blocks: all that are asked."""
    config, spans = small(query_stride=stride, rescore=2), [whole(150, 120), whole(60, 40, 1, 9)]
    case = Case(config, spans, groups=3, positions=where)
    counts = [block.num_candidates for span in case.spans for block in case.blocks(span, False)]
    assert min(counts) <= 4 < sorted(counts)[len(counts) // 2] <= 16 < max(counts)
    check(case)


@pytest.mark.parametrize("stride", [1, 2])
def test_where_all_that_are_asked_vote_they_are_read_where_they_lie(
    stride: int, poison: None
) -> None:
    case = Case(small(query_stride=stride), [whole(151, 29)], groups=3)
    q, _, kv, sequences = case.arguments()
    votes, found = select_votes(q, kv, sequences, case.config, case.logits(), 16)
    assert votes is q
    for block in case.blocks(case.spans[0], False):
        if block.num_candidates > case.config.budget // case.config.block_k:
            exact, _ = reference(case, case.spans[0], block, torch.float64)
            asked = torch.tensor(brute.asked(case.config, block.rows))
            assert_near(found[0, :, block.row + asked].cpu(), exact[:, asked], 1e-5)


@pytest.mark.parametrize("page_size", [0, 16, 7])
def test_padding_and_pages(page_size: int, poison: None) -> None:
    second = [Span(1, 3, 100, 5, 12, 90), Span(1, 100, 180, 12, 17, 75)]
    spans = [whole(151, 20, 0, 11), *second, Span(2, 0, 160, 0, 0, 160)]
    if page_size:  # a page belongs to one row of the block table
        spans = [whole(153, 20, 0, 3), whole(130, 13, 1, 0), whole(20, 20, 2, 9)]
    check(Case(small(query_stride=4), spans, page_size=page_size, heads=2, groups=3))


@pytest.mark.parametrize(
    ("trained", "turns"),
    [(64, dict()), (40, dict()), (40, dict(dim=12, scaling=1.3)), (64, dict(dim=8))],
)
@pytest.mark.parametrize("chunk_indexed", [True, False])
def test_extension(trained: int, turns: dict[str, Any], chunk_indexed: bool, poison: None) -> None:
    """Sink and window at the places that attention gives them, too far or not; the sample as far as
    the window's edge."""
    where = positions(trained, chunk_indexed=chunk_indexed, **turns)
    check(Case(small(query_stride=4), [whole(163, 37, 0, 5)], groups=3, positions=where))


@pytest.mark.parametrize("given", [dict(softcap=3.0), dict(sinks=True), dict(group_shared=False)])
def test_extension_with_every_feature(given: dict[str, Any], poison: None) -> None:
    config = small(query_stride=4, group_shared=given.get("group_shared", True))
    sinks = torch.randn(3) + 2 if given.get("sinks") else None
    where = positions(40, chunk_indexed=True)
    features = dict(sinks=sinks, softcap=given.get("softcap"))
    check(Case(config, [whole(163, 37)], groups=3, positions=where, **features))


@pytest.mark.parametrize("dtype", HALF)
def test_extension_in_half_precision(dtype: torch.dtype, poison: None) -> None:
    shape = dict(dtype=dtype, groups=2, positions=positions(48))
    check(Case(small(query_stride=4), [whole(163, 37)], **shape), ranks_exactly=False)


@pytest.mark.parametrize("block_q", [16, 1])
def test_votes_are_rotated_to_where_they_select(block_q: int) -> None:
    spans = [whole(163, 5 if block_q == 1 else 32)]
    case = Case(small(query_stride=4), spans, groups=3, positions=positions(40))
    votes, near = voted(case, block_q)
    (span,), slots = case.spans, Voting.of(case.config, 3, block_q, True).slots
    for n, block in enumerate(case.blocks(span, block_q == 1)):
        exact = reference(case, span, block, torch.float64)
        chosen = who_votes(exact[1], case.config, block)
        row = torch.arange(block.first, block.last + 1)[:, None]
        distance = (row + 1 - block.window_start).clamp(max=39)
        rows = case.q[0, :, block.row : block.row + block.rows].double()
        rows = rotated(rows, distance, case)[:, :, 0]
        at = slice(n * slots, n * slots + len(chosen))
        for got, of_rows in ((votes, rows), (near, exact[0])):
            want = torch.stack([of_rows[head, row] for row, head in chosen])
            assert (got[0, 0, at] - want).abs().max() < 1e-5


@pytest.mark.parametrize("heads", [1, 3])
def test_ties_go_to_the_lower_row_and_then_head(heads: int) -> None:
    """A sink that outweighs everything: all rows need alike. Without it, those that see fewer keys
    need more, all heads alike. Every second row is asked."""
    for sinks in (torch.full((heads,), 1e8), None):
        case = Case(small(query_stride=4), [whole(131, 16 + 131 % 16)], groups=heads, sinks=sinks)
        case.q[:] = torch.arange(case.q.shape[2])[:, None] * 1e-3 if sinks is not None else 0.0
        near, need = needs(case, 16)
        votes, found = voted(case)
        ids = [(2 * i + 1, head) for i in range(4) for head in range(heads)]
        for got, of_rows in ((votes, case.q), (found, near)):
            want = torch.stack([of_rows[0, head, row] for row, head in ids])
            assert torch.equal(got[0, 0, : len(ids)], want)
        if sinks is not None:
            assert (need[0, :, 1:16:2] == need[0, 0, 1]).all()


def test_the_description_once_more() -> None:
    """Who votes, by the loops of `brute.py`."""
    config = small(query_stride=4, rescore=2, options={"sample": 9, "descent": 3})
    sinks = [1.0, 2.0]
    case = Case(config, [whole(131, 35)], groups=2, softcap=5.0, sinks=torch.tensor(sinks))
    votes, near = voted(case)
    (span,), slots = case.spans, Voting.of(case.config, 2, 16, False).slots

    def logit(row: torch.Tensor, key: torch.Tensor) -> float:
        return 5.0 * math.tanh(float(row @ key) * case.scale / 5.0)

    for n, block in enumerate(case.blocks(span, False)):
        rows = case.q[0, :, block.row : block.row + block.rows].double().transpose(0, 1)
        where = (block.first, block.low, block.high)
        keys = case.keys(span)[0].double()
        want, _ = brute.by_need(config, keys, rows, *where, logit, sinks, most=9)
        at = slice(n * slots, n * slots + len(want))
        assert torch.equal(votes[0, 0, at].double(), torch.stack([row for row, _ in want]))
        found = torch.tensor([found for _, found in want])
        assert (near[0, 0, at].double() - found).abs().max() < 1e-5


@pytest.mark.parametrize("where", [None, positions(48)])
@pytest.mark.parametrize("page_size", [0, 16])
def test_decode_computes_nothing_while_a_selection_is_kept(page_size: int, where: Any) -> None:
    """Of three sequences one was selected two steps ago, one eight, and one is shorter than it
    was."""
    spans = [whole(150, 1), whole(140, 1, 1, 3), whole(160, 1, 2)]
    shape = dict(heads=2, groups=3, page_size=page_size)
    case = Case(small(decode_refresh=8), spans, positions=where, **shape)
    made = torch.tensor([147, 131, 170], dtype=torch.int32, device=DEVICE)
    near, _ = needs(case, 1, made[:, None, None].repeat(1, 2, 1))
    assert near[0].isnan().all()
    for s in (1, 2):
        (block,) = case.blocks(spans[s], True)
        exact, _ = reference(case, spans[s], block, torch.float64)
        assert (near[s] - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    "fields", [dict(), dict(vote="sampled"), dict(score="max"), dict(group_shared=False)]
)
@pytest.mark.parametrize(
    ("block_q", "where"), [(16, None), (16, positions(48)), (1, None), (1, positions(48))]
)
def test_votes_that_are_not_there_are_not_read(
    block_q: int, where: Any, fields: dict[str, Any], poison: None
) -> None:
    """Whatever lies in fresh memory, the search finds the same."""
    first, second = (2, 1) if block_q == 1 else (18, 11)
    spans = [whole(163, first), whole(120, second, 1, 2)]
    case = Case(small(query_stride=4, rescore=2, **fields), spans, groups=3, positions=where)
    got = case.run(block_q)
    assert (got.counts > 0).any()
    new = torch.Tensor.new_empty
    huge = lambda x, *args, **fields: new(x, *args, **fields).fill_(2**30)  # noqa: E731
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(torch.Tensor, "new_empty", huge)
        again = case.run(block_q)
    assert torch.equal(got.indices, again.indices)
    assert torch.equal(got.counts, again.counts)
