"""What `hip_attention` refuses, what it says, and that nothing has happened then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_problem, make_qkv, small

from hip_hf import DecodeState, hip_attention
from hip_hf.attention import attend
from hip_hf.backends.torch.sparse import SparseAttention
from hip_hf.config import REPRESENTATIVES

Shape = tuple[int, ...]

# shapes of q, k and v: which tensor is to blame, and what the message says besides
SHAPES: list[tuple[Shape, Shape, Shape, str, str]] = [
    ((4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), "q", "[batch, heads, tokens, head dim]"),
    ((1, 4, 20, 8), (2, 20, 8), (1, 2, 20, 8), "k", "[batch, heads, tokens, head dim]"),
    ((1, 4, 20, 8), (1, 2, 20, 8), (1, 1, 2, 20, 8), "v", "[batch, heads, tokens, head dim]"),
    ((0, 4, 20, 8), (0, 2, 20, 8), (0, 2, 20, 8), "q.shape", "no empty dimension"),
    ((1, 4, 0, 8), (1, 2, 20, 8), (1, 2, 20, 8), "q.shape", "no empty dimension"),
    ((1, 4, 20, 8), (1, 0, 20, 8), (1, 0, 20, 8), "k.shape", "no empty dimension"),
    ((1, 4, 20, 8), (1, 2, 0, 8), (1, 2, 0, 8), "k.shape", "no empty dimension"),
    ((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 0), "v.shape", "no empty dimension"),
    ((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 21, 8), "v.shape", "(1, 2, 20)"),
    ((1, 4, 20, 8), (1, 2, 20, 8), (1, 4, 20, 8), "v.shape", "(1, 2, 20)"),
    ((1, 4, 20, 8), (1, 2, 20, 8), (2, 2, 20, 8), "v.shape", "(1, 2, 20)"),
    ((2, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), "k.shape", "batch size 2"),
    ((1, 4, 20, 8), (1, 2, 20, 16), (1, 2, 20, 8), "k.shape", "head dim 8"),
    ((1, 5, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), "q.shape", "a multiple of k's 2 heads"),
    ((1, 2, 20, 8), (1, 4, 20, 8), (1, 4, 20, 8), "q.shape", "a multiple of k's 4 heads"),
    ((1, 4, 21, 8), (1, 2, 20, 8), (1, 2, 20, 8), "q.shape", "at most the 20 keys"),
]


@pytest.mark.parametrize(("q", "k", "v", "name", "allowed"), SHAPES)
def test_shapes(q: Shape, k: Shape, v: Shape, name: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*, allowed: ") as caught:
        hip_attention(torch.ones(q), torch.ones(k), torch.ones(v))
    assert allowed in str(caught.value)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda x: x.double(), "dtype"),
        (lambda x: x.half(), "dtype"),
        (lambda x: x.long(), "dtype"),
        (lambda x: x.bool(), "dtype"),
        (lambda x: x.to(torch.complex64), "dtype"),
        (lambda x: x.to_sparse(), "layout"),
        (lambda x: x.to("meta"), "device"),
        (lambda x: x.tolist(), ""),
        (lambda x: None, ""),
    ],
)
def test_dtypes_devices_and_what_is_no_tensor(
    at: int, change: Callable[[torch.Tensor], Any], what: str
) -> None:
    tensors: list[Any] = list(make_qkv(20))
    tensors[at] = change(tensors[at])
    # what does not fit q is reported of k, the first that is compared with it
    name = (
        "qkv"[at]
        if at
        or what in ("", "layout")
        or tensors[0].dtype in (torch.long, torch.bool, torch.complex64)
        else "k"
    )
    with pytest.raises(ValueError, match=rf"^{name}(\.{what})?: got .*, allowed: "):
        hip_attention(*tensors)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(key_start=torch.tensor([0, -1])), r"key_start\[1\]: got -1, allowed: 0 to 20"),
        (dict(key_start=torch.tensor([21, 0])), r"key_start\[0\]: got 21, allowed: 0 to 20"),
        (
            dict(key_start=torch.tensor([0])),
            r"key_start: .*one integer for each of the 2 batch rows",
        ),
        (
            dict(key_start=torch.tensor([0, 1, 2])),
            r"key_start: .*one integer for each of the 2 batch rows",
        ),
        (dict(key_start=torch.tensor([0.0, 1.0])), r"key_start: .*one integer"),
        (dict(key_start=torch.tensor([[0, 1]])), r"key_start: .*one integer"),
        (dict(key_start=1.5), r"key_start: got 1.5, allowed: one integer"),
        (dict(key_start=[True, False]), r"key_start: .*one integer"),
        (dict(q_start=torch.tensor([0, -1])), r"q_start\[1\]: got -1, allowed: 0 to 8"),
        (dict(q_start=torch.tensor([9, 0])), r"q_start\[0\]: got 9, allowed: 0 to 8"),
        (dict(q_start=torch.tensor([1])), r"q_start: .*one integer for each of the 2 batch rows"),
        (dict(scale=0.0), r"scale: got 0.0, allowed: .*> 0"),
        (dict(scale=-1.0), r"scale: got -1.0, allowed: .*> 0"),
        (dict(scale=float("nan")), r"scale: got nan"),
        (dict(scale="1"), r"scale: got '1', allowed: .*number > 0"),
        (dict(sinks=[0.0] * 4), r"sinks: got list, allowed: None or a tensor"),
        (dict(state={}), r"state: got dict, allowed: None or a DecodeState"),
        (dict(softcap=True), r"softcap: got True, allowed: .*number > 0"),
        (dict(scale=float("inf")), r"scale: got inf"),
        (dict(softcap=0.0), r"softcap: got 0.0, allowed: .*> 0"),
        (dict(softcap=-5.0), r"softcap: got -5.0"),
        (dict(softcap=float("nan")), r"softcap: got nan"),
        (dict(sliding_window=0), r"sliding_window: got 0, allowed: .*>= 1"),
        (dict(sliding_window=-4), r"sliding_window: got -4"),
        (dict(sliding_window=4.0), r"sliding_window: got 4.0"),
        (dict(layer=-1), r"layer: got -1, allowed: .*>= 0"),
        (dict(layer="0"), r"layer: got '0'"),
        (dict(sinks=torch.zeros(3)), r"sinks: got shape \(3,\).*allowed: \(4,\)"),
        (dict(sinks=torch.zeros(1, 4)), r"sinks: got shape \(1, 4\)"),
        (dict(sinks=torch.zeros(4, device="meta")), r"sinks: .*on meta, allowed: .*on cpu"),
        (
            dict(sinks=torch.zeros(4, dtype=torch.long)),
            r"sinks.dtype: got torch.int64, allowed: float16",
        ),
        (
            dict(sinks=torch.zeros(4, dtype=torch.complex64)),
            r"sinks.dtype: got torch.complex64, allowed: float16",
        ),
        (
            dict(sinks=torch.tensor([0.0, torch.nan, 0.0, 0.0])),
            r"sinks: got \[0.0, nan, 0.0, 0.0\], allowed: finite numbers",
        ),
        (
            dict(sinks=torch.tensor([0.0, torch.inf, 0.0, 0.0])),
            r"sinks: got \[0.0, inf, 0.0, 0.0\], allowed: finite numbers",
        ),
        (dict(config={"budget": 64}), r"config: got dict, allowed: HiPConfig"),
        (dict(config="hip"), r"config: got str"),
    ],
)
def test_arguments(fields: dict[str, Any], message: str) -> None:
    q, k, v = make_qkv(20, 12, batch=2)
    with pytest.raises(ValueError, match="^" + message):
        hip_attention(q, k, v, **fields)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("at", "where"), [(0, (1, 3, 11, 7)), (1, (1, 1, 19, 0)), (1, (0, 0, 0, 5))]
)
def test_numbers_that_are_not_finite(
    at: int, where: tuple[int, int, int, int], dtype: torch.dtype, value: float
) -> None:
    tensors = make_qkv(20, 12, batch=2, dtype=dtype)
    tensors[at][where] = value
    message = (
        rf"^{'qk'[at]}\[{', '.join(map(str, where))}\]: got {value}, allowed: finite numbers \(1 "
    )
    with pytest.raises(ValueError, match=message):
        hip_attention(*tensors)


def test_large_finite_numbers_are_no_error() -> None:
    q, k, v = make_qkv(20)
    q[..., 0], k[..., 0] = 0.0, 3e38  # their sum is infinite
    assert hip_attention(q, k, v).isfinite().all()


def test_padding_and_unfilled_slots_are_not_looked_at() -> None:
    q, k, v = make_qkv(20, 12, batch=2)
    k[0, :, :3] = k[1, :, 16:] = q[0, :, :1] = torch.nan
    hip_attention(q, k, v, key_start=torch.tensor([3, 0]), q_start=torch.tensor([2, 4]))
    with pytest.raises(ValueError, match=r"^k\[0, 0, 2, 0\]: got nan"):
        hip_attention(q, k, v, key_start=torch.tensor([2, 0]), q_start=torch.tensor([1, 4]))


# A refused call changes nothing.


def snapshot(state: DecodeState) -> dict[int, Any]:
    return copy.deepcopy(
        {b: (row, row.pyramid and vars(row.pyramid)) for b, row in state.rows.items()}
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):  # bit by bit: rows still to be written may hold NaN
        return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return bool(a == b)


BROKEN: list[tuple[str, Callable[..., tuple[tuple[torch.Tensor, ...], dict[str, Any]]]]] = [
    ("shape", lambda q, k, v: ((q, k, v[:, :, 1:]), {})),
    ("dtype", lambda q, k, v: ((q, k.half(), v), {})),
    ("nan", lambda q, k, v: ((q * torch.nan, k, v), {})),
    ("key_start", lambda q, k, v: ((q, k, v), dict(key_start=torch.tensor([999, 0])))),
    ("q_start", lambda q, k, v: ((q, k, v), dict(q_start=torch.tensor([999, 0])))),
    ("softcap", lambda q, k, v: ((q, k, v), dict(softcap=-1.0))),
    ("sinks", lambda q, k, v: ((q, k, v), dict(sinks=torch.zeros(1)))),
    ("config", lambda q, k, v: ((q, k, v), dict(config="hip"))),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN, ids=[name for name, _ in BROKEN])
@pytest.mark.parametrize("rows", [1, 30])
def test_a_refused_call_leaves_the_state_as_it_was(
    rows: int, name: str, broken: Callable[..., Any]
) -> None:
    q, k, v = make_qkv(151, batch=2)
    config, state = small(), DecodeState()
    for end, count in ((120, 120), (121, 1)):
        hip_attention(
            q[:, :, end - count : end], k[:, :, :end], v[:, :, :end], config=config, state=state
        )
    before, end = snapshot(state), 121 + rows
    args, fields = broken(q[:, :, end - rows : end], k[:, :, :end], v[:, :, :end])
    with pytest.raises(ValueError, match="allowed: "):
        hip_attention(*args, state=state, **{"config": config, **fields})
    assert same(snapshot(state), before)
    good = (q[:, :, end - rows : end], k[:, :, :end], v[:, :, :end])
    assert hip_attention(*good, config=config, state=state).isfinite().all()


def test_a_step_on_a_kept_state_refuses_a_new_key_that_is_not_finite() -> None:
    """The whole cache is not read again, but what the step brings is."""
    q, k, v = make_qkv(121)
    config, state = small(), DecodeState()
    hip_attention(q[:, :, :120], k[:, :, :120], v[:, :, :120], config=config, state=state)
    before = snapshot(state)
    k[0, 1, 120, 3] = torch.nan
    with pytest.raises(ValueError, match=r"^k\[0, 1, 120, 3\]: got nan"):
        hip_attention(q[:, :, 120:], k, v, config=config, state=state)
    assert same(snapshot(state), before)


# Where nobody looked: values that are not finite reach the search and the attention.


def check_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every selection from now on must be of its query block's candidates. Gives the list of their
    sizes."""
    sizes: list[int] = []
    take_note = SparseAttention._take_note  # of whatever has been read

    def checked(
        self: SparseAttention, span: Any, heads: Any, blocks: list[Any], ids: torch.Tensor | None
    ) -> None:
        for i, block in enumerate(blocks):
            if ids is not None:
                chosen = ids[:, :, i]
                sizes.append(chosen.shape[-1])
                assert ((chosen >= block.low) & (chosen < block.high)).all(), (
                    f"{chosen} outside {block}"
                )
                assert (chosen.diff() > 0).all()
        take_note(self, span, heads, blocks, ids)

    monkeypatch.setattr(SparseAttention, "_take_note", checked)
    return sizes


@pytest.mark.parametrize("representative", REPRESENTATIVES)
@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("rows", [150, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_blocks_stay_in_range_whatever_the_numbers(
    value: float,
    rows: int,
    score: str,
    representative: str,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
) -> None:
    sizes = check_blocks(monkeypatch)
    threads(1)
    for rescore in (1, 2):
        for what, part in (
            ("q", slice(None)),
            ("k", slice(70, 71)),
            ("k", slice(30, 110)),
            ("qk", slice(None)),
        ):
            q, k, v = make_qkv(150, rows)
            for name, x in (("q", q), ("k", k)):
                if name in what:
                    x[:, :, part] = value
            config = small(representative=representative, score=score, rescore=rescore)
            assert attend(make_problem(q, k, v), config).path == "sparse"
    assert set(sizes) == {4}


@pytest.mark.parametrize("score", ["mass", "max"])
def test_products_that_overflow(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite q and k whose products are not."""
    check_blocks(monkeypatch)
    for sign in (1, -1):
        q, k, v = make_qkv(150)
        hip_attention(q.abs() * 1e25, sign * k.abs() * 1e25, v, config=small(score=score))


def test_a_value_that_is_not_finite_stays_with_the_rows_that_read_it() -> None:
    q, k, v = make_qkv(150)
    v[0, 0, 40, 3] = torch.nan
    out = hip_attention(q, k, v, config=small())
    clean = hip_attention(q, k, v.nan_to_num(0.0), config=small())
    touched = out.isnan().any(-1)[0]
    assert not touched[2:].any()  # the other key head's
    assert not touched[:, :32].any()  # earlier query blocks
    assert touched[:2, 40:64].all()  # the rest of its own, and the next, which has it in the window
    assert torch.equal(out[0, ~touched], clean[0, ~touched])
