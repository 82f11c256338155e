"""`DecodeState`: steps on a kept state read what they must, whatever happens to the cache in
between.

`Twin` says what a step must read: it keeps the cache as plain tensors, selects without any state,
and remembers only what the rules of reuse let a step reuse. The expected output is plain attention
under that mask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, make_problem, make_qkv, small, sparse
from twin import Twin

from hip_hf.attention import attend, hip_attention
from hip_hf.methods.hip import Selector
from hip_hf.state import DecodeState

pytestmark = pytest.mark.usefixtures("one_thread")


SETTINGS: list[dict[str, Any]] = [
    dict(decode_refresh=1),
    dict(decode_refresh=3),
    dict(decode_refresh=8),
    dict(decode_refresh=3, group_shared=False),
    dict(decode_refresh=5, representative="minmax", rescore=2),
    dict(decode_refresh=5, representative="middle", score="max", block_k=2, budget=8),
    dict(decode_refresh=4, method="oracle"),
    dict(decode_refresh=4, method="streaming"),
]
ids = [" ".join(f"{name}={value}" for name, value in fields.items()) for fields in SETTINGS]


@pytest.mark.fast
@pytest.mark.parametrize("fields", SETTINGS, ids=ids)
@pytest.mark.parametrize("prompt", [0, 17, 80])
def test_token_by_token(prompt: int, fields: dict) -> None:
    twin = Twin(small(**fields), [0, 5])
    if prompt:
        twin.call(prompt)
    for _ in range(60):
        twin.call(1)
    assert (twin.reused > 0) == (twin.config.decode_refresh > 1)


@pytest.mark.parametrize(
    "call", [dict(softcap=2.0), dict(sliding_window=60), dict(sliding_window=45, scale=0.5)]
)
@pytest.mark.parametrize("refresh", [1, 5])
def test_token_by_token_with_features(refresh: int, call: dict) -> None:
    twin = Twin(small(decode_refresh=refresh), [0, 5], call)
    twin.call(30)
    for _ in range(70):
        twin.call(1)


def test_a_selection_serves_as_many_steps_as_asked_its_own_included() -> None:
    twin = Twin(small(decode_refresh=4), [0])
    twin.call(100)  # a prompt leaves no selection behind
    reused = []
    for _ in range(9):
        before = twin.reused
        twin.call(1)
        reused.append(twin.reused - before)
    assert reused == [0, 1, 1, 1, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("refresh", [1, 3, 64])
def test_several_rows_select_for_themselves_and_the_last_leaves_its_selection(refresh: int) -> None:
    twin = Twin(small(decode_refresh=refresh), [0, 9])
    twin.call(90)
    for rows in (1, 1, 5, 1, 1, 1, 16, 1, 2, 1, 40, 1, 1):
        twin.call(rows)


@pytest.mark.fast
@pytest.mark.parametrize("refresh", [1, 8])
@pytest.mark.parametrize("length", [150, 119, 118, 117, 100, 64, 33, 6, 3, 0])
def test_crop(length: int, refresh: int) -> None:
    """Prompt-lookup: tokens are taken back, and others come in their place."""
    twin = Twin(small(decode_refresh=refresh), [0, 5])
    twin.call(100)
    for _ in range(20):
        twin.call(1)
    for _ in range(2):
        twin.crop(length)
        for _ in range(20):
            twin.call(1)
        twin.call(4)


@pytest.mark.fast
@pytest.mark.parametrize("refresh", [1, 8])
@pytest.mark.parametrize(
    "indices", [[2, 0, 1], [0, 0, 0], [1, 1, 2], [2], [1, 0], [0, 0, 1, 1, 2, 2]]
)
def test_reorder(indices: list[int], refresh: int) -> None:
    """Beam search: copies go separate ways for longer than the window, so that their pyramids must
    part."""
    twin = Twin(small(decode_refresh=refresh), [0, 5, 40])
    twin.call(100)
    for _ in range(3):
        twin.call(1)
    twin.reorder(indices)
    for _ in range(25):
        twin.call(1)
    twin.reorder([len(indices) - 1, 0])
    for _ in range(20):
        twin.call(1)


def test_copies_share_their_pyramid_until_one_grows() -> None:
    twin = Twin(small(decode_refresh=1), [0])
    twin.call(100)
    twin.call(1)
    twin.reorder([0, 0])
    first, second = (twin.state.rows[b].pyramid for b in range(2))
    assert first is second
    before = [
        rows[:, : first.blocks >> level].clone() for level, rows in enumerate(first.levels)
    ]  # what is beyond is not written
    for _ in range(30):
        twin.call(1)
    assert twin.state.rows[0].pyramid is not twin.state.rows[1].pyramid
    assert all(
        torch.equal(was, now[:, : was.shape[1]])
        for was, now in zip(before, first.levels, strict=False)
    )


@pytest.mark.parametrize("refresh", [1, 8])
def test_repeat(refresh: int) -> None:
    twin = Twin(small(decode_refresh=refresh), [0, 5])
    twin.call(80)
    twin.call(1)
    twin.repeat(3)
    for _ in range(40):
        twin.call(1)


def test_a_cropped_copy_leaves_the_other_alone() -> None:
    twin = Twin(small(decode_refresh=1), [0, 20])
    twin.call(100)
    twin.call(1)
    twin.reorder([0, 0, 1])
    twin.crop(70)
    for _ in range(40):
        twin.call(1)


@pytest.mark.fast
def test_reset() -> None:
    twin = Twin(small(), [0, 5])
    for prompt in (100, 50, 16):
        twin.call(prompt)
        for _ in range(30):
            twin.call(1)
        twin.reset()
        assert not twin.state.rows


@pytest.mark.parametrize("call", [dict(), dict(sliding_window=50)], ids=["full", "sliding"])
@pytest.mark.parametrize("refresh", [1, 3, 8])
@pytest.mark.parametrize("run", range(3))
def test_anything_in_any_order(run: int, refresh: int, call: dict) -> None:
    torch.manual_seed(run)
    pick = torch.Generator().manual_seed(run)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=pick))

    twin = Twin(small(decode_refresh=refresh, group_shared=run % 2 == 0), [0, 11, 2], call)
    twin.call(60)
    for _ in range(40):
        match below(8):
            case 0:
                twin.crop(max(0, twin.length - below(40)))
            case 1:
                twin.reorder([below(len(twin.pads)) for _ in range(1 + below(4))])
            case 2 if len(twin.pads) == 1:
                twin.repeat(3)
            case 3:
                twin.call(2 + below(30))
            case _:
                for _ in range(1 + below(10)):
                    twin.call(1)


# The state notices by itself.


def test_another_prompt_on_a_used_state_starts_afresh() -> None:
    state = DecodeState()
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v = make_qkv(120)
        got = sparse(q[:, :, :100], k[:, :, :100], v[:, :, :100], small(), state=state)
        assert_near(got.out, sparse(q[:, :, :100], k[:, :, :100], v[:, :, :100], small()).out, 1e-6)
        step = sparse(q[:, :, 100:101], k[:, :, :101], v[:, :, :101], small(), state=state)
        assert_near(
            step.out,
            sparse(
                q[:, :, 100:101], k[:, :, :101], v[:, :, :101], small(), state=DecodeState()
            ).out,
            1e-6,
        )


@pytest.mark.parametrize(
    "other",
    [dict(representative="minmax"), dict(block_k=8), dict(budget=8), dict(options={"weight": 0.1})],
)
def test_other_settings_start_afresh(other: dict) -> None:
    q, k, v = make_qkv(120)
    state = DecodeState()
    for tokens, fields in ((117, {}), (118, other), (119, {}), (120, other)):
        row = (q[:, :, tokens - 1 : tokens], k[:, :, :tokens], v[:, :, :tokens])
        got = sparse(*row, small(**fields), state=state)
        assert_near(got.out, sparse(*row, small(**fields), state=DecodeState()).out, 1e-6)


def test_other_padding_starts_afresh() -> None:
    """Also where the row's next position would fit."""
    q, k, v = make_qkv(124)
    state = DecodeState()
    for tokens, pad in ((118, 3), (119, 4), (120, 4), (122, 5), (124, 6)):
        row = (q[:, :, tokens - 1 : tokens], k[:, :, :tokens], v[:, :, :tokens])
        got = sparse(*row, small(decode_refresh=1), [pad], state=state)
        assert_near(got.out, sparse(*row, small(decode_refresh=1), [pad]).out, 1e-6)


def test_from_dense_to_sparse_as_the_context_grows() -> None:
    q, k, v = make_qkv(140)
    state, config, paths = DecodeState(), small(dense_below=100), []
    for first, end in [(0, 60), *[(t, t + 1) for t in range(60, 140)]]:
        row = (q[:, :, first:end], k[:, :, :end], v[:, :, :end])
        out, mask = hip_attention(*row, config=config, state=state, return_mask=True)
        paths.append("dense" if mask is None else "sparse")
        if mask is not None and (end - 100) % 8 == 0:
            assert_near(out, sparse(*row, small(), state=DecodeState()).out, 1e-6)
    assert paths == ["dense"] * 40 + ["sparse"] * 41


def test_a_dense_call_in_between_costs_the_selection_only() -> None:
    q, k, v = make_qkv(140)
    state = DecodeState()
    for t in range(100, 140):
        row = (q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        if t % 10 == 5:
            assert attend(make_problem(*row), small(method="dense"), state=state).path == "dense"
        elif t % 10 == 6:
            assert_near(
                sparse(*row, small(), state=state).out,
                sparse(*row, small(), state=DecodeState()).out,
                1e-6,
            )
        else:
            sparse(*row, small(), state=state)


def test_a_state_made_in_inference_mode_serves_outside_of_it() -> None:
    q, k, v = make_qkv(140)
    state = DecodeState()
    for t in range(90, 140):
        row = (q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        with torch.inference_mode(t < 110):
            got = sparse(*row, small(decode_refresh=1), state=state)
        assert_near(got.out, sparse(*row, small(decode_refresh=1)).out, 1e-6)


def test_other_keys_start_afresh() -> None:
    """Another number of heads, head dim or dtype: what was kept would not fit."""
    state = DecodeState()
    for shape in (dict(), dict(heads=1), dict(dim=8), dict(dtype=torch.bfloat16)):
        q, k, v = make_qkv(121, **shape)
        for tokens in (120, 121):
            row = (q[:, :, tokens - 1 : tokens], k[:, :, :tokens], v[:, :, :tokens])
            got = sparse(*row, small(decode_refresh=1), state=state)
            assert_near(got.out, sparse(*row, small(decode_refresh=1)).out, 1e-6)


def test_static_cache_layers_hand_every_operation_to_their_state() -> None:
    """By content: which batch row holds which pyramid, and how far it goes."""
    from hip_hf.integration.cache_layers import HiPStaticLayer

    def filled() -> tuple[Any, list[Any]]:
        layer = HiPStaticLayer(max_cache_len=64)
        keys = torch.randn(3, 1, 40, 8)
        layer.update(keys, keys)
        pyramids = [Selector(small()).make_pyramid(torch.float32) for _ in range(3)]
        for b, pyramid in enumerate(pyramids):
            pyramid.extend(keys[b], 9)
            layer.hip_state.row(b, 0, 0, 40).pyramid = pyramid
        return layer, pyramids

    layer, pyramids = filled()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert [layer.hip_state.rows[b].pyramid for b in range(3)] == [
        pyramids[2],
        pyramids[0],
        pyramids[0],
    ]
    assert [pyramid.shared for pyramid in pyramids] == [True, False, False]
    layer, pyramids = filled()
    layer.reset()
    assert layer.hip_state.rows == {}
    layer, pyramids = filled()
    layer.hip_state.crop(30)
    assert [(row.position, row.pyramid.blocks) for row in layer.hip_state.rows.values()] == [
        (30, 7)
    ] * 3
