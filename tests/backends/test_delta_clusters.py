"""Delta correction by clusters: the formulas one key and one row at a time, and that it corrects
what depends on the query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import exp, log, sqrt, tanh
from typing import Any

import pytest
import torch
from helpers import assert_near, causal, eager, make_problem, make_qkv, small

from hip_hf.attention import attend
from hip_hf.backends.clusters import CLUSTERS
from hip_hf.eval.measure.costs import call_cost
from hip_hf.geometry import query_blocks
from hip_hf.state import DecodeState


def assigned(keys: torch.Tensor) -> list[int]:
    """The cluster of each of one head's keys `[n, D]`, one after the other."""
    centres, members, ids = keys[:CLUSTERS].clone(), [[] for _ in range(CLUSTERS)], []  # type: ignore[var-annotated]
    for i, key in enumerate(keys):
        if (
            i >= CLUSTERS and (i // CLUSTERS) & (i // CLUSTERS - 1) == 0 and i % CLUSTERS == 0
        ):  # as many again have joined
            centres = torch.stack(
                [keys[m].mean(0) if m else c for m, c in zip(members, centres, strict=True)]
            )
        ids.append(int((centres - key).square().sum(-1).argmin()))
        members[ids[-1]].append(i)
    return ids


def estimated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ids: list[int],
    left: list[int],
    cap: float | None,
) -> Iterator[tuple[float, torch.Tensor]]:
    """One row's attention to the keys `left`, by the clusters `ids` they are in: the terms' weights
    and values."""
    scale = q.shape[-1] ** -0.5
    for c in sorted({ids[j] for j in left}):
        some = [j for j in left if ids[j] == c]
        mean, variance = k[some].mean(0), k[some].var(0, correction=0)
        spread = sqrt(float((q.square() * variance).sum())) * scale
        most = sqrt(2 * log(len(some)))
        above = spread**2 / 2 if spread < most else spread * most - log(len(some))
        logit = float(q @ mean) * scale + above
        logit = logit if cap is None else cap * tanh(logit / cap)
        yield logit + log(len(some)), v[some].mean(0)


def written_down(
    q: Any, k: Any, v: Any, config: Any, start: int, **fields: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrected output and log-sum-exp of one call over one sequence with `start` keys of padding,
    in loops."""
    problem = make_problem(q, k, v, [start], **fields)
    sparse = attend(
        problem, replace(config, delta=None, dense_tail=0), need_lse=True, need_mask=True
    )
    assert sparse.lse is not None
    assert sparse.mask is not None
    dense_out, dense_lse = eager(q, k, v, causal(1, q.shape[2], k.shape[2], [start]), **fields)
    out, lse = sparse.out.clone(), sparse.lse.clone()
    (span,) = problem.spans
    sink, gamma = -(-config.sink // config.block_k) * config.block_k, config.delta
    groups = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        keys, values = k[0, head // groups, start:], v[0, head // groups, start:]
        ids = assigned(keys[sink:])
        anchors: list[tuple[Any, float]] = []
        for at, block in enumerate(query_blocks(config, problem.spans[0], False)):
            shared = head // groups if config.group_shared else head
            chosen = sparse.mask.indices[
                0, shared, at, : sparse.mask.counts[0, shared, at]
            ].tolist()
            left = [j for j in range(sink, block.window_start) if j // config.block_k not in chosen]
            if not left:
                continue
            for position in range(block.first, block.last + 1):
                row = span.row_start + position - span.position
                e, weight = out[0, head, row].clone(), float(lse[0, head, row])
                if block.window_start - sink >= CLUSTERS:
                    known = (
                        q[0, head, row],
                        keys[sink:],
                        values[sink:],
                        ids,
                        [j - sink for j in left],
                    )
                    terms = [(weight, e), *estimated(*known, fields.get("softcap"))]
                    whole = log(sum(exp(t[0]) for t in terms))
                    e, weight = sum(exp(t[0] - whole) * t[1] for t in terms), whole
                d, d_weight = dense_out[0, head, row], float(dense_lse[0, head, row])
                if position % gamma == 0:
                    anchors.append((d - e, d_weight - weight))
                    out[0, head, row], lse[0, head, row] = d, d_weight
                elif anchors:
                    fade = [(15 / 16) ** (len(anchors) - 1 - i) for i in range(len(anchors))]
                    more, more_weight = (
                        sum(f * a[n] for f, a in zip(fade, anchors, strict=True)) / sum(fade)
                        for n in (0, 1)
                    )
                    out[0, head, row], lse[0, head, row] = e + more, weight + more_weight
                else:
                    out[0, head, row], lse[0, head, row] = e, weight
    tail = max(gamma, config.dense_tail)
    out[:, :, -tail:], lse[:, :, -tail:] = dense_out[:, :, -tail:], dense_lse[:, :, -tail:]
    return out, lse


def clustered(
    tokens: int, dtype: torch.dtype = torch.float64, kinds: int = 40, batch: int = 1
) -> tuple[torch.Tensor, ...]:
    """Keys of a few kinds with a value each, in no order, and queries that look for one kind each:
    what a row misses is another thing in the next row."""
    kind_k, kind_v = torch.randn(kinds, 16), torch.randn(kinds, 16)
    kind = torch.randint(kinds, (tokens,))
    noise = lambda: torch.randn(batch, 2, tokens, 16) / 8  # noqa: E731
    k, v = kind_k[kind] + noise(), kind_v[kind] + noise()
    q = 2 * kind_k[torch.randint(kinds, (batch, 4, tokens))]
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("rows", "start", "config", "fields"),
    [
        (330, 0, dict(), dict()),
        (330, 37, dict(group_shared=False, dense_tail=40), dict()),
        (100, 0, dict(method="streaming"), dict(softcap=2.0)),
        (330, 0, dict(method="streaming", options=dict(recent=True), delta=7), dict(sinks=True)),
        (330, 5, dict(method="quest", sink=5, window=21, block_q=24), dict()),
    ],
)
def test_the_formulas(
    rows: int, start: int, config: dict[str, Any], fields: dict[str, Any]
) -> None:
    tokens = 330
    q, k, v = make_qkv(tokens, rows, dtype=torch.float64)
    given = (
        {**fields, "sinks": torch.linspace(-2, 3, 4, dtype=torch.float64)}
        if "sinks" in fields
        else fields
    )
    settings = small(**{"delta": 16, **config})
    got = attend(make_problem(q, k, v, [start], **given), settings, need_lse=True, need_mask=True)
    assert (got.path, got.reason) == ("sparse", "")
    assert got.mask is not None
    problem, gamma = make_problem(q, k, v, [start]), settings.delta
    plain = attend(problem, replace(settings, delta=None, dense_tail=0))
    (span,) = problem.spans
    missed = dict.fromkeys(range(span.position, span.end), 0)  # keys that a row leaves out
    for block in query_blocks(settings, span, False):
        budget = settings.budget // 4 if settings.method != "streaming" or settings.options else 0
        missed |= {
            p: 4 * max(0, block.num_candidates - budget) for p in range(block.first, block.last + 1)
        }
    tail = max(gamma, settings.dense_tail)
    fewer = sum(n for p, n in missed.items() if p % gamma and p < span.end - tail)
    assert got.density == pytest.approx(1 - (1 - plain.density) * fewer / sum(missed.values()))
    out, lse = written_down(q, k, v, settings, start, **given)
    real = slice(max(0, start - (tokens - rows)), None)
    assert_near(got.out[:, :, real], out[:, :, real], 1e-9)
    assert_near(got.lse[:, :, real], lse[:, :, real], 1e-9, "lse")


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("streaming", torch.float32), ("hip", torch.float32), ("streaming", torch.bfloat16)],
)
def test_it_corrects_what_depends_on_the_query(method: str, dtype: torch.dtype) -> None:
    """The error falls by more than half, where the last dense row's difference makes it larger;
    over several draws, of which one says little."""
    settings = [dict(), dict(delta=32), dict(delta=32, delta_mode="step")]
    errors = torch.zeros(len(settings))
    for _ in range(4):
        q, k, v = clustered(600, dtype)
        want = eager(q, k, v, causal(1, 600, 600))[0]
        outs = [
            attend(make_problem(q, k, v), small(method=method, **fields)).out for fields in settings
        ]
        errors += torch.tensor([float((out - want).norm()) for out in outs])
    plain, clusters, step = errors.tolist()
    assert clusters < plain / 2, errors
    assert step > plain, errors


@pytest.mark.parametrize(
    "config", [dict(), dict(method="streaming"), dict(method="oracle", group_shared=False)]
)
def test_chunks_give_what_one_call_gives(config: dict[str, Any]) -> None:
    """Up to the last rows of each chunk, which are dense: their anchors count for the next chunk
    all the same."""
    q, k, v = make_qkv(500, batch=2, dtype=torch.float64)
    settings, state, starts = (
        small(delta=32, dense_tail=32, **config),
        DecodeState(),
        [0, 48],
    )  # padding of whole query blocks
    whole = attend(make_problem(q, k, v, starts), settings, need_lse=True)
    for first, end in pairwise([0, 96, 144, 272, 336, 500]):
        problem = make_problem(q[:, :, first:end], k[:, :, :end], v[:, :, :end], starts)
        got = attend(problem, settings, None, state, need_lse=True)
        same = slice(0, max(0, end - first - 32))
        real = slice(first, first + same.stop)
        for b, start in enumerate(starts):
            if first >= start:
                assert_near(got.out[b, :, same], whole.out[b, :, real], 1e-12)
                assert_near(got.lse[b, :, same], whole.lse[b, :, real], 1e-12, "lse")


def test_decode_goes_on_as_prefill_would(threads: Any) -> None:
    """With every row its own query block, every step after a prefill gives what the row gives in
    one long prefill."""
    threads(1)  # a step is too small to share out
    q, k, v = make_qkv(230, batch=2, dtype=torch.float64)
    config = small(delta=16, decode_refresh=1, block_q=1, query_stride=1)
    whole, state = attend(make_problem(q, k, v, [0, 5]), config, need_lse=True), DecodeState()
    attend(make_problem(q[:, :, :170], k[:, :, :170], v[:, :, :170], [0, 5]), config, None, state)
    for at in range(170, 230 - 16):
        got = attend(
            make_problem(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], [0, 5]),
            config,
            None,
            state,
            True,
        )
        assert_near(got.out, whole.out[:, :, at : at + 1], 1e-12)
        assert_near(got.lse, whole.lse[:, :, at : at + 1], 1e-12, "lse")
        assert got.density < 1


def test_steps_between_refreshes_are_corrected(threads: Any) -> None:
    """The window's start stays between refreshes, and so does what the clusters hold; no step here
    is an anchor."""
    threads(1)
    q, k, v = clustered(300)
    want = eager(q, k, v, causal(1, 300, 300))[0]
    errors = []
    for delta in (None, 1000):
        state, error = DecodeState(), 0.0
        config = small(method="streaming", delta=delta, decode_refresh=8)
        attend(make_problem(q[:, :, :250], k[:, :, :250], v[:, :, :250]), config, None, state)
        for at in range(250, 300):
            got = attend(
                make_problem(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1]),
                config,
                None,
                state,
            )
            error += float((got.out - want[:, :, at : at + 1]).square().sum())
        errors.append(error**0.5)
    assert errors[1] < errors[0] / 2


def step(x: tuple[torch.Tensor, ...], at: int, config: Any, state: DecodeState) -> torch.Tensor:
    q, k, v = x
    return attend(
        make_problem(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1]),
        config,
        None,
        state,
    ).out


def test_the_state_follows_the_cache() -> None:
    """After a crop a step gives what a fresh state gives; rows that were one go on apart, and
    neither disturbs the other."""
    tensors = make_qkv(200, dtype=torch.float64)
    config, state, fresh = small(delta=16, decode_refresh=1), DecodeState(), DecodeState()
    attend(make_problem(*(x[:, :, :190] for x in tensors)), config, None, state)
    step(tensors, 190, config, state)
    state.crop(185)
    assert_near(step(tensors, 185, config, state), step(tensors, 185, config, fresh), 1e-12)

    kept, alone = state.rows[0].correction, []
    assert kept is not None
    assert kept.clusters is not None
    known = kept.clusters.known
    state.reorder([0, 0])
    apart = [
        torch.cat([x, y]) for x, y in zip(tensors, make_qkv(200, dtype=torch.float64), strict=True)
    ]
    for x in apart[1:]:
        x[1, :, :186] = x[0, :, :186]  # the same up to here
    both = [step(tuple(apart), at, config, state) for at in range(186, 200)]
    for b in (0, 1):
        one = DecodeState()
        one.rows = {0: replace(fresh.rows[0])}
        one._owner = fresh._owner
        one.reorder([0, 0])
        one.reorder([0])
        alone.append(
            [step(tuple(x[b : b + 1] for x in apart), at, config, one) for at in range(186, 200)]
        )
    for i, out in enumerate(both):
        for b in (0, 1):
            assert_near(out[b], alone[b][i][0], 1e-12)
    assert kept.clusters.known == known, "what a copy was made of has changed"


@pytest.mark.parametrize(
    ("config", "fields", "why"),
    [
        (
            dict(method="hyper", options=dict(min_seq_len=32, block_size=8, sample_size=8)),
            dict(),
            "hyper selects no key blocks",
        ),
        (dict(), dict(sliding_window=100), "keys leave the sliding window"),
    ],
)
def test_where_it_cannot_serve_it_goes_by_steps_and_says_so(
    config: dict[str, Any], fields: dict[str, Any], why: str
) -> None:
    problem = make_problem(*make_qkv(203), **fields)
    got, want = (
        attend(problem, small(delta=16, delta_mode=mode, **config)) for mode in ("clusters", "step")
    )
    assert (got.path, got.reason) == (
        "sparse",
        f"Delta correction by steps: {why if 'sliding' in why else 'method ' + why}",
    )
    assert want.reason == ""
    assert torch.equal(got.out, want.out)


def test_what_it_costs() -> None:
    """On top of its dense rows: products of each row with every cluster, and of each key that joins
    with every centre."""
    span = make_problem(*make_qkv(413)).spans[0]
    plain, corrected = small(method="streaming"), small(method="streaming", delta=32)
    blocks = query_blocks(plain, span, False)
    costs = [call_cost(config, blocks, 0, 413, 16, 8) for config in (plain, corrected)]
    dense = [
        p for p in range(0, 413, 32) if p >= blocks[2].first
    ]  # the first whose window leaves a key out
    assert blocks[1].num_candidates == 0 < blocks[2].num_candidates
    rows = sum(block.rows for block in blocks if block.window_start - 4 >= CLUSTERS)
    products = rows * CLUSTERS * (2 * 16 + 8) + (blocks[-1].window_start - 4) * CLUSTERS * 16
    assert costs[1].attention - costs[0].attention == 2 * (
        products + sum(p + 1 for p in dense) * 24
    )
    assert costs[1].read - costs[0].read == sum(p + 1 for p in dense)
    assert costs[1].attention_bytes > costs[0].attention_bytes
