"""Positions given inside the kernels against the torch backend, whose rules `test_extension.py`
holds to plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from both_backends import NEAR, both, call, same
from decode_cases import scratch_for
from families import make_batch, make_model
from helpers import assert_near, make_problem, make_qkv, small
from interpreter import DEVICE
from kernel_cases import Case, make_case, precisions, spans_of
from with_rope import EXTENDED, positions

import hip_hf
from hip_hf.attention import attend
from hip_hf.backends.triton import dense as kernels
from hip_hf.backends.triton.attention.decode import decode
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.dense import attend_densely
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span
from hip_hf.problem import AttentionProblem
from hip_hf.state import DecodeState

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]


def check(case: Case, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Against float64: at most twice the error of the torch backend in the same dtype and
    precision, or twice one unit in the last place."""
    want, plain = case.reference(), []
    for precision in precisions(case.q, case.q.shape[-1]):
        with precision:
            plain.append(case.reference(case.q.dtype))
    real = ~want[1].isnan()
    for i, (got, dtype) in enumerate(((out, case.q.dtype), (lse, torch.float32))):
        exact = want[i][real]
        error = max(float((rough[i].double()[real] - exact).abs().max()) for rough in plain)
        least = torch.finfo(dtype).eps * float(exact.abs().max())
        assert_near(got.cpu().double()[real], exact, 2 * max(error, least))
    assert out.cpu()[~real].isnan().all(), "rows outside every sequence were written"


TURNS = [dict(), dict(dim=32), dict(dim=24, scaling=1.3)]


@pytest.mark.parametrize(
    ("groups", "dtype", "turns"),
    [
        (1, torch.float32, 0),
        (2, torch.bfloat16, 0),
        (3, torch.float32, 2),
        (4, torch.float16, 1),
        (7, torch.bfloat16, 2),
    ],
)
def test_a_prompt_in_every_dtype(groups: int, dtype: torch.dtype, turns: int) -> None:
    where = positions(160, **{"dim": 64, **TURNS[turns]})
    case = make_case(groups=groups, dtype=dtype, positions=where)
    out, lse = case.empty()
    prefill(case.operands(out, lse), case.part())
    check(case, out, lse)


@pytest.mark.parametrize(
    ("dim", "dv", "turns"), [(80, 80, 80), (96, 64, 48), (128, 128, 128), (16, 24, 10)]
)
def test_head_dims(dim: int, dv: int, turns: int) -> None:
    case = make_case(
        spans_of((0, 83, 83)),
        heads=1,
        dim=dim,
        dv=dv,
        window=16,
        positions=positions(150, dim=turns),
    )
    out, lse = case.empty()
    prefill(case.operands(out, lse), case.part())
    check(case, out, lse)


@pytest.mark.parametrize(("shared", "page_size"), [(True, 0), (False, 16), (True, 48)])
def test_padding_and_pages(shared: bool, page_size: int) -> None:
    spans = [Span(0, 0, 150, 0, 60, 90), Span(1, 37, 150, 0, 60, 53), Span(2, 11, 41, 30, 60, 0)]
    case = make_case(spans, shared=shared, positions=positions(160, dim=64))
    out, lse = case.empty()
    prefill(case.operands(out, lse, page_size), case.part())
    check(case, out, lse)


@pytest.mark.parametrize(
    ("splits", "page_size", "dtype"),
    [(1, 0, torch.float32), (4, 16, torch.bfloat16), (16, 7, torch.float32)],
)
def test_a_decode_step_split_over_its_keys(splits: int, page_size: int, dtype: torch.dtype) -> None:
    where = positions(224, dim=48)
    case = make_case(
        spans_of((0, 340, 1), (60, 233, 1)),
        per_row=True,
        most=9,
        dtype=dtype,
        groups=3,
        positions=where,
    )
    out, lse = case.empty()
    decode(case.operands(out, lse, page_size), case.part(), scratch_for(case, splits))
    check(case, out, lse)


@pytest.mark.parametrize(
    ("trained", "fields"),
    [
        (64, dict()),
        (
            40,
            dict(dense_tail=21),
        ),  # rounding reads more than was trained; rows that are dense read what is too far
        (52, dict(dense_tail=50, group_shared=False)),
        (64, dict(method="streaming", dense_tail=5)),
        (64, dict(vote="sampled", query_stride=3)),
        (64, dict(query_stride=3, group_shared=False)),
        (64, dict(vote="sampled", query_stride=1, rescore=3)),
        (64, dict(representative="middle", query_stride=5)),
        (64, dict(score="max", rescore=2)),
    ],
)
def test_a_prompt_selects_and_reads_the_same(
    trained: int, fields: dict[str, Any], poison: None
) -> None:
    both(*make_qkv(141, 70), {**EXTENDED, **fields}, positions=positions(trained))


@pytest.mark.parametrize("rows", [20, 130])
@pytest.mark.parametrize("fields", [dict(), dict(dim=8), dict(dim=12, scaling=0.7)])
def test_partial_and_scaled_rotation(rows: int, fields: dict[str, Any]) -> None:
    both(*make_qkv(130, rows), {**EXTENDED, "dense_tail": 9}, positions=positions(64, **fields))


def test_batches_with_padding() -> None:
    where = positions(50)
    both(
        *make_qkv(130, 40, batch=3),
        {**EXTENDED, "dense_tail": 7},
        positions=where,
        key_start=[0, 33, 110],
        q_start=[70, 90, 90],
    )


@pytest.mark.parametrize(
    "fields", [dict(), dict(method="streaming"), dict(group_shared=False, decode_refresh=1)]
)
def test_decode_with_a_state(fields: dict[str, Any]) -> None:
    """A prompt, steps across refreshes and key blocks, a crop, a step of several rows."""
    q, k, v = make_qkv(160, batch=2, heads=1)
    states, where = {"triton": DecodeState(), "torch": DecodeState()}, positions(40)

    def step(first: int, end: int) -> list[Any]:
        results = []
        for backend, state in states.items():
            config = small(**{**EXTENDED, "backend": backend, "decode_refresh": 3, **fields})
            parts = (q[:, :, first:end], k[:, :, :end], v[:, :, :end])
            results.append(call(*parts, config, state, key_start=[0, 21], positions=where))
        return results

    same(*step(0, 150))
    for position in range(150, 156):
        same(*step(position, position + 1))
    for state in states.values():
        state.crop(120)
    same(*step(120, 121))
    same(*step(121, 122))
    got, want = step(122, 126)
    assert_near(got.out.cpu(), want.out, NEAR)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("trained", [24, 64, 131])
def test_dense_rows_clamp_distances(
    splits: int, trained: int, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of a long call are the dense tail, split over their keys."""
    monkeypatch.setattr(kernels, "splits_for", lambda *_, **__: splits)
    config = dict(extend="streaming", sink=4, window=8, budget=8, block_q=16, dense_tail=200)
    both(*make_qkv(131, 90), config, positions=positions(trained, scaling=1.2))


@pytest.mark.parametrize("rows", [1, 7, 60])
@pytest.mark.parametrize("trained", [24, 64, 200])
def test_dense_layers(rows: int, trained: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the kernels' as well."""
    served, original = [], kernels.attend_densely
    monkeypatch.setattr(
        kernels, "attend_densely", lambda *args: served.append(1) or original(*args)
    )
    tensors = make_qkv(131, rows, batch=2)
    found = []
    for name in ("triton", "torch"):
        config = HiPConfig(method="dense", backend=name, extend="streaming")
        problem = make_problem(
            *(x.to(DEVICE) for x in tensors), key_start=[0, 40], positions=positions(trained)
        )
        found.append(attend(problem, config, need_lse=True))
    assert_near(found[0].out.cpu(), found[1].out.cpu(), NEAR)
    assert_near(found[0].lse.cpu(), found[1].lse.cpu(), NEAR, "lse")
    assert served == [1]


@pytest.mark.parametrize("rows", [1, 90])
@pytest.mark.parametrize(
    ("trained", "fields"),
    [
        (64, dict()),
        (64, dict(rescore=3, group_shared=False)),
        (38, dict(rescore=2, score="max")),  # chunks are equally far almost at once
        (64, dict(coarsest=4, beam=1)),  # a start level longer than a tile
        (64, dict(query_stride=5, rescore=2)),
        (64, dict(representative="middle")),
        (64, dict(representative="minmax", vote="sampled", query_stride=3)),
    ],
)
def test_chunk_indexed_selection(rows: int, trained: int, fields: dict[str, Any]) -> None:
    tokens = 900 if "coarsest" in fields else 230
    both(
        *make_qkv(tokens, rows, heads=1),
        {**EXTENDED, **fields},
        positions=positions(trained, chunk_indexed=True),
    )


@pytest.mark.parametrize("turns", [dict(dim=8), dict(dim=12, scaling=0.7)])
def test_chunk_indexed_partial_rotation(turns: dict[str, Any]) -> None:
    where = positions(64, chunk_indexed=True, **turns)
    both(*make_qkv(230, 40, heads=1), {**EXTENDED, "rescore": 2}, positions=where)


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_a_model_generates_the_same_from_pages(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its trained length: a prompt, and steps on a `HiPCache`; both layers are
    chunk-indexed, or dense."""
    batch, found, dense = make_batch([150]), [], []

    def densely(problem: AttentionProblem, *args: Any) -> Any:
        dense.append(type(problem.k).__name__)
        return attend_densely(problem, *args)

    monkeypatch.setattr(kernels, "attend_densely", densely)
    for backend in ("triton", "torch"):
        model = make_model("llama", backend=backend)
        model.config.max_position_embeddings = 96
        hip_hf.configure(model, extend="streaming", dense_below=0 if path == "sparse" else 1000)
        model.to(DEVICE if backend == "triton" else "cpu")
        inputs = {name: x.to(model.device) for name, x in batch.items()}
        with torch.no_grad():
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=4,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert {(row.path, row.cache) for row in hip_hf.explain(model)} == {(path, "pages")}
        assert {row.reason for row in hip_hf.explain(model)} == (
            {""} if path == "sparse" else {"context of 153 is below dense_below=1000"}
        )
        found.append(torch.stack(out.logits).cpu())
    assert_near(*found, 1e-4)
    assert dense == ([] if path == "sparse" else ["Tensor"] * 2 + ["PagedTensor"] * 6)
