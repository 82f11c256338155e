"""HyperAttention: what it weighs, written down again from its description; the estimate is
unbiased, every key counts once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import make_batch, make_model
from helpers import assert_near, causal, eager, make_problem, make_qkv, small
from hyper_by_hand import OPTIONS, pairs, weights

import hip_hf
from hip_hf.attention import attend
from hip_hf.config import HiPConfig
from hip_hf.methods import hyper
from hip_hf.methods.hyper import Options


def config_of(seed: int = 0, **options: Any) -> HiPConfig:
    return small(method="hyper", options={**OPTIONS, **options}, seed=seed, dense_layers=0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
@pytest.mark.parametrize(("tokens", "rows"), [(64, 64), (101, 101), (101, 60), (120, 17)])
@pytest.mark.parametrize(
    "options", [{}, dict(block_size=16, sample_size=50), dict(sample_size=0), dict(lsh_num_projs=2)]
)
@pytest.mark.usefixtures("poison")
def test_it_weighs_what_is_written_down(
    tokens: int, rows: int, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    q, k, v = make_qkv(tokens, rows, heads=shape[0], groups=shape[1], dv=8)
    config = config_of(**options)
    weight = weights(q, k, config)
    for fields in (dict(), dict(softcap=2.0, sinks=torch.linspace(-1, 2, q.shape[1]))):
        got = attend(make_problem(q, k, v, **fields), config, need_lse=True)
        # a key that counts w times is one whose logit is log(w) larger
        logits = (
            q.double()
            @ k.double().repeat_interleave(shape[1], 1).transpose(2, 3)
            * q.shape[3] ** -0.5
        )
        if fields:
            logits = 2 * torch.tanh(logits / 2)
        logits = (logits + weight.log())[0]
        if fields:
            sinks = fields["sinks"].double()[:, None, None].expand(*logits.shape[:2], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        out = logits.softmax(-1)[..., :tokens] @ v[0].double().repeat_interleave(shape[1], 0)
        assert_near(got.out[0], out, 1e-5)
        assert_near(got.lse[0], logits.logsumexp(-1), 1e-5, "lse")


def test_every_key_counts_once() -> None:
    """Pairs are in one part only; within a square, own keys once, sampled ones for all the others,
    none for both."""
    q, k, _ = make_qkv(90, heads=1, groups=2)
    count = torch.zeros(90, 90)
    for some, others, exact in pairs(0, 90, 24):
        for i in some:
            count[i, others.start : (i + 1 if exact else others.stop)] += 1
    assert torch.equal(count, torch.ones(90, 90).tril())
    weight = weights(q, k, config_of())
    one_or_many = (
        (weight == 0) | (weight == 1) | (weight > 2)
    )  # the smallest square has 22 keys and samples 6
    assert one_or_many.all()
    assert (weight[:, causal(1, 90, 90)[0, 0].logical_not()] == 0).all()


@pytest.mark.parametrize(
    ("first", "end", "longest"),
    [(0, 100, 24), (0, 1, 24), (30, 100, 24), (7, 200, 11), (99, 100, 10)],
)
def test_split_is_a_partition(first: int, end: int, longest: int) -> None:
    seen = torch.zeros(end - first, end)
    leaves, levels = hyper.split(first, end, longest)
    for leaf in leaves:
        assert leaf.end - leaf.start <= longest
        for i in range(leaf.first, leaf.end):
            seen[i - first, leaf.start : i + 1] += 1
    for level in levels:
        rows = [i for square in level for i in range(square.first, square.end)]
        assert len(rows) == len(set(rows))
        for square in level:
            seen[square.first - first : square.end - first, square.key_first : square.key_end] += 1
    assert torch.equal(seen, causal(1, end - first, end)[0, 0].float())


def test_the_denominator_is_unbiased(threads: Any) -> None:
    """Over seeds, the estimate of the softmax denominator is within three standard errors of the
    truth."""
    threads(1)  # too small to share out
    q, k, v = make_qkv(64, heads=1, groups=1, dim=8)
    truth = eager(q, k, v, causal(1, 64, 64))[1].exp()
    problem, seeds = make_problem(q, k, v), 400
    estimates = torch.stack(
        [
            attend(problem, config_of(seed), need_lse=True).lse.double().exp() / truth
            for seed in range(seeds)
        ]
    )
    for some in (estimates[..., 32:].mean((1, 2, 3)), estimates[..., 40], estimates[..., 63]):
        some = some.flatten()
        error = float(some.std() / math.sqrt(seeds))
        assert error > 0  # it is an estimate
        assert abs(float(some.mean()) - 1) < 3 * error
    assert_near(
        estimates[..., :16], torch.ones_like(estimates[..., :16]), 1e-5
    )  # the first leaf is exact


@pytest.mark.parametrize(
    "options", [dict(min_seq_len=500), dict(sample_size=500), dict(block_size=500)]
)
@pytest.mark.parametrize("rows", [333, 100])
def test_dense_where_nothing_is_left_out(options: dict[str, Any], rows: int) -> None:
    tensors = make_qkv(333, rows)
    got = attend(make_problem(*tensors), config_of(**options), need_lse=True)
    out, lse = eager(*tensors, causal(1, rows, 333))
    assert got.path == "sparse"
    assert_near(got.out, out)
    assert_near(got.lse, lse, what="lse")


def test_neighbouring_buckets_differ_in_one_sign() -> None:
    signs = torch.tensor([[1.0 if code >> i & 1 else -1.0 for i in range(5)] for code in range(32)])
    ranks = hyper.hashes(signs, torch.eye(5))
    assert sorted(ranks.tolist()) == list(range(32))
    ordered = signs[ranks.argsort()]
    assert ((ordered[1:] != ordered[:-1]).sum(-1) == 1).all()


def test_seeds() -> None:
    problem = make_problem(*make_qkv(120))
    first, again, other = (attend(problem, config_of(seed)).out for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_finds_what_hashes_alike() -> None:
    """A planted pair of parallel vectors lands in one own block, where random ones seldom do."""
    found = 0
    for seed in range(20):
        torch.manual_seed(seed)
        q, k, _ = make_qkv(128, heads=1, groups=1, needles={100: 20})
        found += bool(
            weights(q, k, config_of(min_seq_len=64, sample_size=0, lsh_num_projs=4))[0, 100, 20]
            == 1
        )
    assert found >= 8  # by chance: 8 of 64 keys, so 2.5


def test_why_it_goes_dense() -> None:
    q, k, v = make_qkv(200)
    reasons = {
        "decodes densely": attend(make_problem(q[:, :, -1:], k, v), config_of()).reason,
        "sliding window": attend(make_problem(q, k, v, sliding_window=50), config_of()).reason,
        "exact up to": attend(make_problem(q, k, v), small(method="hyper", dense_below=1)).reason,
    }
    for says, reason in reasons.items():
        assert says in reason
    assert attend(make_problem(q, k, v, sliding_window=50), config_of()).unsupported
    assert attend(make_problem(q, k, v, sliding_window=200), config_of()).path == "sparse"


def test_density_is_what_the_weights_read() -> None:
    q, k, v = make_qkv(200, heads=1, groups=1)
    config = config_of()
    read = (weights(q, k, config) > 0).sum()
    assert attend(make_problem(q, k, v), config).density == pytest.approx(
        float(read) / (200 * 201 / 2), rel=0.02
    )


@pytest.mark.parametrize("tail", [10, 200])
def test_dense_tail(tail: int) -> None:
    tensors = make_qkv(200)
    config = small(method="hyper", options=OPTIONS, dense_tail=tail)
    got = attend(make_problem(*tensors), config)
    assert_near(got.out[:, :, -tail:], eager(*tensors, causal(1, 200, 200))[0][:, :, -tail:])
    assert (got.density == 1) == (tail == 200)


def test_the_registered_name() -> None:
    """`hyper` takes its options from the settings, leaves dense layers dense, and decodes densely,
    visibly."""
    model = make_model("llama", "hyper", method="hyper", options=OPTIONS, dense_layers=[0])
    with torch.no_grad():
        model(**make_batch([90]))
        report = hip_hf.explain(model)
        assert [(row.method, row.path) for row in report] == [
            ("hyper", "dense"),
            ("hyper", "sparse"),
        ]
        assert "dense layer" in report[0].reason
        model.generate(**make_batch([90]), max_new_tokens=3, do_sample=False)
    assert "decodes densely" in hip_hf.explain(model)[1].reason
    model = make_model(
        "llama", "hyper", options={"weight": 0.25}
    )  # another method's options do not hinder
    with torch.no_grad():
        model(**make_batch([90]))
    assert hip_hf.explain(model)[0].method == "hyper"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(block_size=0), "block_size"),
        (dict(sample_size=-1), "sample_size"),
        (dict(lsh_num_projs=31), "lsh_num_projs"),
        (dict(min_seq_len=True), "min_seq_len"),
        (dict(layers=[1]), "layers"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        HiPConfig(method="hyper", options=options)
    assert Options().min_seq_len == 4096
