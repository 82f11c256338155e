"""A sequence's result does not depend on what else is in its batch: lengths on both sides of
`dense_below`, steps and prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import make_batch, make_model
from helpers import assert_near, make_qkv, small

from hip_hf import explain, hip_attention
from hip_hf.attention import Result, attend
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span
from hip_hf.problem import AttentionProblem
from hip_hf.registry import METHODS
from hip_hf.state import DecodeState

WIDTH = 200
# As many keys and query rows as each sequence has: a prompt so short that all of it is a step, one
# below `dense_below`, others above; a step of a few rows and a chunk in one call.
LENGTHS = [(9, 9), (60, 60), (200, 200), (150, 7), (180, 90)]


def spans_of(side: str) -> tuple[Span, ...]:
    """One sequence in each batch row, padded on one side. Where a sequence has fewer rows than
    keys, it goes on in a cache."""
    spans = []
    for batch, (keys, rows) in enumerate(LENGTHS):
        first = 0 if side == "right" else WIDTH - keys
        row = 0 if side == "right" else WIDTH - rows
        spans.append(Span(batch, first, first + keys, row, row + rows, keys - rows))
    return tuple(spans)


def call(problem: AttentionProblem, config: HiPConfig) -> Result:
    return attend(problem, config, need_lse=True, need_mask=True)


def alone(problem: AttentionProblem, span: Span, config: HiPConfig) -> Result:
    """The sequence without any padding, in a batch of its own."""
    rows, keys = slice(span.row_start, span.row_end), slice(span.key_start, span.key_end)
    batch = slice(span.batch, span.batch + 1)
    own = Span(0, 0, span.keys, 0, span.rows, span.position)
    q, k, v = problem.q[batch, :, rows], problem.k[batch, :, keys], problem.v[batch, :, keys]
    return call(replace(problem, q=q, k=k, v=v, spans=(own,)), config)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "fields",
    [dict(method=method) for method in METHODS] + [dict(delta=16)],
)
def test_a_sequence_is_computed_as_it_is_alone(fields: dict[str, Any], side: str) -> None:
    """Output, log-sum-exp and selection; with settings that prune even the shortest."""
    config = small(**{**dict(budget=4, sink=0, window=0, dense_below=100, dense_tail=8), **fields})
    q, k, v = make_qkv(WIDTH, batch=len(LENGTHS), dtype=torch.float64)
    problem = AttentionProblem(q, k, v, spans_of(side), q.shape[3] ** -0.5)
    together = call(problem, config)
    read = seen = 0.0
    assert together.lse is not None
    for span in problem.spans:
        single = alone(problem, span, config)
        rows = slice(span.row_start, span.row_end)
        assert single.lse is not None
        assert_near(together.out[span.batch, :, rows], single.out[0], 1e-10)
        assert_near(together.lse[span.batch, :, rows], single.lse[0], 1e-10, "lse")
        if together.mask is not None:
            blocks = 0 if single.mask is None else single.mask.first.shape[1]
            assert (together.mask.first[span.batch, blocks:] == -1).all()
            if single.mask is not None:
                for got, want in zip(
                    (together.mask.first, together.mask.counts),
                    (single.mask.first, single.mask.counts),
                    strict=True,
                ):
                    assert torch.equal(got[span.batch, ..., :blocks], want[0])
                assert torch.equal(
                    together.mask.indices[span.batch, :, :blocks], single.mask.indices[0]
                )
        visible = sum(range(span.position + 1, span.end + 1))
        read, seen = read + single.density * visible, seen + visible
    assert together.density == pytest.approx(read / seen)
    # padding: no row, no key
    inside = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
    for span in problem.spans:
        inside[span.batch, span.row_start : span.row_end] = True
    assert (together.out.transpose(1, 2)[~inside] == 0).all()
    assert (together.lse.transpose(1, 2)[~inside] == -torch.inf).all()


def test_the_reason_says_how_many_were_dense() -> None:
    q, k, v = make_qkv(WIDTH, batch=len(LENGTHS))
    problem = AttentionProblem(q, k, v, spans_of("right"), q.shape[3] ** -0.5)
    result = call(problem, small(dense_below=100))
    assert result.path == "sparse"
    assert result.reason == "2 of 5 sequences dense: context of 60 is below dense_below=100"


def test_gradients_of_a_sequence_are_those_it_has_alone() -> None:
    config = small(dense_below=100)
    q, k, v = (x.requires_grad_() for x in make_qkv(WIDTH, batch=len(LENGTHS), dtype=torch.float64))
    problem = AttentionProblem(q, k, v, spans_of("right"), q.shape[3] ** -0.5)
    result = attend(problem, config, need_lse=True)
    assert result.lse is not None
    finite = torch.where(result.lse.isfinite(), result.lse, 0)
    together = torch.autograd.grad(result.out.square().sum() + finite.sum(), (q, k, v))
    singles = [alone(problem, span, config) for span in problem.spans]
    loss = torch.stack([single.out.square().sum() + single.lse.sum() for single in singles]).sum()  # type: ignore[union-attr]
    for got, want in zip(together, torch.autograd.grad(loss, (q, k, v)), strict=True):
        assert_near(got, want, 1e-9, "gradient")


def test_steps_on_a_kept_state_pass_the_threshold_one_by_one() -> None:
    """Two sequences decode together; the longer one is sparse from the first step on, the other one
    from a later step."""
    config, steps, starts = small(dense_below=100, decode_refresh=4), 12, [0, 55]
    q, k, v = make_qkv(WIDTH, batch=2, dtype=torch.float64)
    both, single = DecodeState(), [DecodeState(), DecodeState()]
    for step in range(150 - steps, 150 + steps):
        first = 0 if step == 150 - steps else step
        spans = [
            Span(b, start, step + 1, max(start - first, 0), step + 1 - first, max(first - start, 0))
            for b, start in enumerate(starts)
        ]
        rows = q[:, :, first : step + 1]
        problem = AttentionProblem(
            rows, k[:, :, : step + 1], v[:, :, : step + 1], tuple(spans), q.shape[3] ** -0.5
        )
        together = attend(problem, config, state=both)
        for b, span in enumerate(spans):
            one = replace(
                problem,
                q=rows[b : b + 1],
                k=problem.k[b : b + 1],
                v=problem.v[b : b + 1],
                spans=(replace(span, batch=0),),
            )
            assert_near(
                together.out[b],
                attend(one, config, state=single[b]).out[0],
                1e-10,
                f"step {step}, sequence {b}",
            )


# Models


def logits_alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_a_padded_batch_are_those_of_each_text(side: str) -> None:
    model = make_model("llama", dense_below=100, dense_layers=0)
    lengths = [20, 90, 180]
    texts = [torch.randint(5, 90, (length,)) for length in lengths]
    ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        at = slice(0, len(text)) if side == "right" else slice(max(lengths) - len(text), None)
        ids[row, at], mask[row, at] = text, 1
    with torch.no_grad():
        logits = model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    report = explain(model)
    assert {row.path for row in report} == {"sparse"}
    assert all("2 of 3 sequences dense" in row.reason for row in report)
    for row, text in enumerate(texts):
        assert_near(logits[row, mask[row].bool()], logits_alone(model, text), 1e-4, f"text {row}")


def test_explain_says_that_no_mask_arrived() -> None:
    """Padding that nobody tells of is read as text."""
    model = make_model("llama")
    batch = make_batch([40, 64])
    note = "No padding mask arrived with the last batch of 2"
    with torch.no_grad():
        model(**batch)
        assert [row.unmasked for row in explain(model)] == [0, 0]
        assert note not in str(explain(model))
        model(batch["input_ids"])
        assert [row.unmasked for row in explain(model)] == [2, 2]
        assert note in str(explain(model))
        model(batch["input_ids"][:1])  # a single text needs none
        assert note not in str(explain(model))


def test_steps_that_are_all_padded_alike_have_a_row_for_each_query_row() -> None:
    """All sequences of a call are steps of 16 rows, each behind a row of padding."""
    q, k, v = make_qkv(67, 17, batch=2)
    config, starts = small(), torch.tensor([51, 51])
    out, lse = hip_attention(q, k, v, config=config, key_start=starts, return_lse=True)
    alone, alone_lse = hip_attention(
        q[:, :, 1:], k[:, :, 51:], v[:, :, 51:], config=config, return_lse=True
    )
    assert out.shape == q.shape
    assert_near(out[:, :, 1:], alone)
    assert_near(lse[:, :, 1:], alone_lse, 1e-5, "lse")
    assert not out[:, :, 0].any()
    assert (lse[:, :, 0] == -torch.inf).all()
