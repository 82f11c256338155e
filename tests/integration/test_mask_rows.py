"""Masks by themselves, without a model: what a row of key positions says is what Transformers' own
mask says in full."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from hip_hf.geometry import Span
from hip_hf.integration import masks, model_checks
from hip_hf.integration.masks import (
    LAST,
    PAD,
    check_mask,
    hip_mask,
    holds_positions,
    mask_spans,
    mask_window,
    narrowed,
    unmasked_rows,
    visible_rows,
)

pytestmark = pytest.mark.fast

KEYS = 24


def padding(*real: tuple[int, int], keys: int = KEYS) -> torch.Tensor:
    """A padding mask whose rows have the given keys, first and end."""
    at = torch.arange(keys)
    return torch.stack([((at >= first) & (at < end)).int() for first, end in real])


def full(
    batch: int,
    rows: int,
    keys: int,
    q_offset: int,
    kv_offset: int,
    pattern: Callable,
    **fields: Any,
) -> torch.Tensor:
    mask = sdpa_mask(
        batch, rows, keys, q_offset, kv_offset, pattern, allow_is_causal_skip=False, **fields
    )
    assert mask is not None
    return mask


def said_by(
    spans: tuple[Span, ...], batch: int, rows: int, keys: int, window: int | None
) -> torch.Tensor:
    """What the rows of spans see: the keys from their span's first one up to their own, within the
    window."""
    seen = torch.zeros(batch, 1, rows, keys, dtype=torch.bool)
    for span in spans:
        for row in range(span.row_start, span.row_end):
            at = span.position + row - span.row_start
            first = 0 if window is None else max(0, at + 1 - window)
            assert at < span.keys
            seen[span.batch, 0, row, span.key_start + first : span.key_start + at + 1] = True
    return seen


# query rows, keys, position of the first query, position of the first key, padding
CALLS: dict[str, tuple[int, int, int, int, torch.Tensor | None]] = {
    "prompt": (KEYS, KEYS, 0, 0, None),
    "chunk": (5, KEYS, KEYS - 5, 0, None),
    "step": (1, KEYS, KEYS - 1, 0, None),
    "left": (KEYS, KEYS, 0, 0, padding((0, KEYS), (7, KEYS))),
    "left, few rows": (9, KEYS, KEYS - 9, 0, padding((20, KEYS), (3, KEYS))),
    "right": (KEYS, KEYS, 0, 0, padding((0, KEYS), (0, 17))),
    "both sides": (KEYS, KEYS, 0, 0, padding((2, 20), (0, 1))),
    "static cache": (4, KEYS, 6, 0, padding((0, 10), (3, 10), keys=10)),
    "sliding cache": (3, 12, 20, 11, padding((0, 23), (15, 23), keys=23)),
    "nothing is real": (KEYS, KEYS, 0, 0, padding((0, 0), (4, KEYS))),
}


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", CALLS)
def test_rows_see_what_the_full_mask_shows(name: str, window: int | None) -> None:
    rows, keys, q_offset, kv_offset, pad = CALLS[name]
    batch = 2 if pad is None else len(pad)
    pattern = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    given = None if pad is None else pad.bool()
    want = full(batch, rows, keys, q_offset, kv_offset, pattern, attention_mask=given)
    mask = hip_mask(batch, rows, keys, q_offset, kv_offset, pattern, given, local_size=window)
    assert (mask.dtype, mask.shape) == (torch.int32, (batch, 1, 1, keys))
    seen = visible_rows(mask, mask_window(mask, None), rows, torch.empty(batch, 2, keys, 8))
    assert torch.equal(seen(0, rows), want)
    assert torch.equal(seen(1, rows), want[:, :, 1:])
    spans = mask_spans(mask, rows)
    assert spans is not None
    got = said_by(spans, batch, rows, keys, window)
    in_spans = got.any(-1, keepdim=True)
    assert torch.equal(got, want & in_spans)
    real = torch.ones(batch, kv_offset + keys) if pad is None else pad
    own = real[:, q_offset : q_offset + rows].bool()
    assert torch.equal(in_spans[:, 0, :, 0], own), (
        "every row that is no padding, and no other, is in a span"
    )


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_the_last_rows_of_a_call_see_what_they_saw(keep: int) -> None:
    """A model may go on with them alone, under the same mask."""
    rows, keys, q_offset, kv_offset, pad = CALLS["left, few rows"]
    assert pad is not None
    mask = hip_mask(2, rows, keys, q_offset, kv_offset, causal_mask_function, pad.bool())
    want = full(
        2, rows, keys, q_offset, kv_offset, causal_mask_function, attention_mask=pad.bool()
    )[:, :, -keep:]
    spans = mask_spans(mask, keep)
    assert spans is not None
    assert torch.equal(said_by(spans, 2, keep, keys, None), want)
    assert torch.equal(visible_rows(mask, None, keep, torch.empty(2, 2, keys, 8))(0, keep), want)
    assert mask_spans(mask, rows) != spans, "spans are remembered by the number of rows"
    assert mask_spans(mask, keep) is spans


@pytest.mark.parametrize("real", [[0, 1, 2, 4, 5, 6], [1, 2, 3, 5], [0, 5]])
def test_a_hole_has_no_spans(real: list[int]) -> None:
    pad = torch.zeros(2, KEYS, dtype=torch.bool)
    pad[0], pad[1, real] = True, True
    mask = hip_mask(2, KEYS, KEYS, 0, 0, causal_mask_function, pad)
    assert mask_spans(mask, KEYS) is None
    want = full(2, KEYS, KEYS, 0, 0, causal_mask_function, attention_mask=pad)
    assert torch.equal(visible_rows(mask, None, KEYS, torch.empty(2, 2, KEYS, 8))(0, KEYS), want)


PACKED = torch.tensor([[0] * 7 + [1] * 1 + [2] * 16, [0] * 20 + [1] * 4])


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("rows", [KEYS, 17, 5, 1])
def test_packed_sequences(rows: int, window: int | None) -> None:
    causal = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    pattern = and_masks(causal, packed_sequence_mask_function(PACKED))
    want = full(2, KEYS, KEYS, 0, 0, pattern)[:, :, -rows:]
    mask = hip_mask(2, KEYS, KEYS, 0, 0, pattern, local_size=window)
    assert (mask.dtype, mask.shape, mask_window(mask, 3)) == (torch.int64, (2, 1, 1, KEYS), window)
    spans = mask_spans(mask, rows)
    assert spans is not None
    assert torch.equal(said_by(spans, 2, rows, KEYS, window), want)
    seen = visible_rows(mask, window, rows, torch.empty(2, 2, KEYS, 8))
    assert torch.equal(seen(0, rows), want)
    assert torch.equal(seen(rows // 2, rows), want[:, :, rows // 2 :])


def test_one_row_of_sequences_serves_the_whole_batch() -> None:
    mask = hip_mask(
        3,
        KEYS,
        KEYS,
        0,
        0,
        and_masks(causal_mask_function, packed_sequence_mask_function(PACKED[:1])),
    )
    assert torch.equal(mask[:, 0, 0], LAST + PACKED[:1].expand(3, -1))


# What is not a row of positions.

IN_FULL: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "bidirectional": (bidirectional_mask_function, {}),
    "may skip": (bidirectional_mask_function, dict(allow_is_bidirectional_skip=True)),
    "chunked": (chunked_causal_mask_function(4, torch.tensor([0, 3])), {}),
    "more than causal": (or_masks(causal_mask_function, bidirectional_mask_function), {}),
    "a user's own": (lambda batch, head, row, key: (key + row) % 3 == 0, {}),
    "by vmap": (
        lambda batch, head, row, key: (key <= row) & torch.tensor(row.ndim == 0),
        dict(use_vmap=True),
    ),
}


@pytest.mark.parametrize("name", IN_FULL)
@pytest.mark.parametrize("pad", [None, padding((0, 18), (3, 18), keys=18)])
def test_other_patterns_are_given_in_full(pad: torch.Tensor | None, name: str) -> None:
    pattern, fields = IN_FULL[name]
    given = None if pad is None else pad.bool()
    got = hip_mask(2, 5, 16, 13, 2, pattern, given, **fields)
    want = full(
        2,
        5,
        16,
        13,
        2,
        pattern,
        attention_mask=given,
        **{k: v for k, v in fields.items() if k == "use_vmap"},
    )
    assert torch.equal(got, want)
    assert got.any()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_offset_of_a_static_cache_is_a_tensor(shape: tuple[int, ...]) -> None:
    got = hip_mask(2, 4, KEYS, torch.full(shape, 6), 0, causal_mask_function)
    assert got.dtype == torch.int32
    assert torch.equal(got, hip_mask(2, 4, KEYS, 6, 0, causal_mask_function))


def test_masks_are_made_where_they_are_asked_for() -> None:
    """On the device of the call, which is none here that holds numbers."""
    call = (2, 5, KEYS, KEYS - 5, 0)
    mask, whole = (
        hip_mask(*call, pattern, device="meta")
        for pattern in (causal_mask_function, bidirectional_mask_function)
    )
    assert (mask.device.type, whole.device.type) == ("meta", "meta")
    packed = hip_mask(
        *call,
        and_masks(causal_mask_function, packed_sequence_mask_function(PACKED.to("meta"))),
        device="meta",
    )
    for given in (mask, packed, None):
        assert (
            visible_rows(given, None, 5, torch.empty(2, 2, KEYS, 8, device="meta"))(
                0, 5
            ).device.type
            == "meta"
        )


def test_a_packed_prompt_does_not_mark_a_model_that_computes_with_its_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For packed sequences Transformers itself asks for a mask in full."""
    monkeypatch.setattr(masks, "_computing", set())
    pattern = and_masks(causal_mask_function, packed_sequence_mask_function(PACKED))
    config = AutoConfig.for_model("llama", attn_implementation="hip")
    for asked in (
        dict(mask_function=pattern, allow_is_causal_skip=False),
        dict(mask_function=causal_mask_function),
    ):
        assert hip_mask(2, KEYS, KEYS, 0, 0, config=config, **asked).dtype != torch.bool
    assert (
        hip_mask(
            2, 2, KEYS, 22, 0, causal_mask_function, config=config, allow_is_causal_skip=False
        ).dtype
        == torch.bool
    )


def test_an_export_gets_the_mask_in_full_and_looks_at_no_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masks, "exporting", lambda: True)
    config: Any = PreTrainedConfig()
    config.hip = {"no such": "setting"}
    got = hip_mask(2, 5, KEYS, KEYS - 5, 0, causal_mask_function, config=config)
    assert torch.equal(got, full(2, 5, KEYS, KEYS - 5, 0, causal_mask_function))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no such"):
        hip_mask(2, 5, KEYS, KEYS - 5, 0, causal_mask_function, config=config)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_padding_mask_of_another_batch(rows: int) -> None:
    said = rf"^attention_mask: got shape \({rows}, 24\) for a batch of 2, allowed: one row of 0 and"
    with pytest.raises(ValueError, match=said):
        hip_mask(2, KEYS, KEYS, 0, 0, causal_mask_function, torch.ones(rows, KEYS))


def test_rows_that_nobody_gave_a_mask_for() -> None:
    pad = padding((0, KEYS), (3, KEYS)).bool()
    with_mask, without, alone = (
        hip_mask(len(x), 5, KEYS, KEYS - 5, 0, causal_mask_function, y)
        for x, y in ((pad, pad), (pad, None), (pad[:1], None))
    )
    assert [unmasked_rows(mask, 2) for mask in (with_mask, without, alone)] == [0, 2, 0]
    assert [unmasked_rows(None, batch) for batch in (1, 2, 3)] == [0, 2, 3]
    assert unmasked_rows(with_mask.clone(), 2) == 0, "of a copy, nothing is known"


def test_no_mask_at_all_stands_for_the_last_rows() -> None:
    keys = torch.empty(2, 2, KEYS, 8)
    want = full(1, 5, KEYS, KEYS - 5, 0, causal_mask_function)
    assert torch.equal(visible_rows(None, None, 5, keys)(1, 5), want[:, :, 1:])
    windowed = full(1, 5, KEYS, KEYS - 5, 0, sliding_window_causal_mask_function(4))
    assert torch.equal(visible_rows(None, 4, 5, keys)(0, 5), windowed)


def test_masks_of_others_are_taken_as_they_are() -> None:
    for mask in (torch.rand(2, 4, 5, KEYS), torch.rand(1, 1, 5, KEYS) > 0.5):
        rows = visible_rows(mask, 4, 5, torch.empty(2, 2, KEYS, 8))
        assert torch.equal(rows(1, 4), mask[:, :, 1:4])
    same = torch.rand(2, 1, 1, KEYS) > 0.5  # for all rows
    assert visible_rows(same, None, 5, torch.empty(2, 2, KEYS, 8))(1, 4) is same


# Copies, parts and strangers.


def ours(kind: str) -> torch.Tensor:
    packed = and_masks(causal_mask_function, packed_sequence_mask_function(PACKED))
    pad = padding((2, KEYS), (0, 20)).bool()
    return hip_mask(
        2, KEYS, KEYS, 0, 0, *((packed,) if kind == "packed" else (causal_mask_function, pad))
    )


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_a_copy_says_the_same(kind: str) -> None:
    mask = ours(kind)
    assert mask_spans(mask.clone(), KEYS) == mask_spans(mask, KEYS)
    assert mask_window(mask.clone(), 7) == 7
    assert mask_window(mask, 7) is None


STRANGERS = {
    "positions from 0": torch.arange(KEYS, dtype=torch.int32).expand(2, 1, 1, -1),
    "one key out of its place": ours("padded") + torch.eye(KEYS, dtype=torch.int32)[10],
    "longs that do not begin with the first sequence": ours("packed") + 1,
    "longs that begin before the first sequence": ours("packed") - (torch.arange(KEYS) == 0).long(),
    "longs that leave a sequence out": ours("packed") + (ours("packed") > LAST),
    "longs that go back": ours("packed").flip(-1),
    "short integers": torch.zeros(2, 1, 1, KEYS, dtype=torch.int16),
    "other integers with the right numbers": ours("padded").to(torch.uint32),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_refused(name: str) -> None:
    mask = STRANGERS[name]
    what = rf"^attention_mask: got a 4-D {mask.dtype} tensor, allowed: "
    what += "a 2-D mask, or a 4-D one of booleans"
    with pytest.raises(ValueError, match=what):
        mask_spans(mask.clone(), KEYS)


def test_all_padding_is_a_copy_too() -> None:
    assert mask_spans(torch.full((2, 1, 1, KEYS), PAD, dtype=torch.int32), KEYS) == ()


def test_what_was_attached_stays_with_the_first_keys() -> None:
    mask = hip_mask(2, 4, KEYS, 6, 0, sliding_window_causal_mask_function(5), local_size=5)
    spans = mask_spans(mask, 4)
    narrow = narrowed(mask, 10)
    assert torch.equal(narrow, mask[..., :10])
    assert (mask_window(narrow, None), unmasked_rows(narrow, 2), mask_spans(narrow, 4)) == (
        5,
        2,
        spans,
    )
    assert narrowed(mask, KEYS) is mask
    copy = narrowed(mask.clone(), 10)
    assert copy.shape[-1] == 10
    assert mask_window(copy, 9) == 9
    for other in (torch.ones(1, 1, 4, KEYS, dtype=torch.bool), torch.ones(1, 1, 4, KEYS)):
        assert narrowed(other, 10) is other


def test_who_holds_positions() -> None:
    kinds = {
        torch.int32: True,
        torch.int64: True,
        torch.bool: False,
        torch.float32: False,
        torch.bfloat16: False,
    }
    assert {kind: holds_positions(torch.zeros(1, dtype=kind)) for kind in kinds} == kinds


QUERY = torch.Size((2, 4, 5, 8))
FIT = [(2, 4, 5, KEYS), (1, 4, 5, KEYS), (2, 1, 5, KEYS), (2, 4, 1, KEYS), (1, 1, 1, KEYS)]
MISFIT = [
    (3, 4, 5, KEYS),
    (2, 2, 5, KEYS),
    (2, 4, 4, KEYS),
    (2, 4, 5, KEYS - 1),
    (2, 4, 5, 1),
    (5, KEYS),
    (2, 5, KEYS),
]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_that_broadcast_fit(kind: torch.dtype) -> None:
    for shape in FIT:
        check_mask(torch.zeros(shape, dtype=kind), QUERY, KEYS)
    for shape in MISFIT:
        got = re.escape(f"got a {kind} tensor of shape {shape} for 2 rows of 24 keys")
        with pytest.raises(
            ValueError,
            match=rf"^attention_mask: {got}, allowed: one that broadcasts to \(2, 4, 5, 24\)$",
        ):
            check_mask(torch.zeros(shape, dtype=kind), QUERY, KEYS)


def test_rows_of_positions_fit_one_shape() -> None:
    check_mask(torch.zeros(2, 1, 1, KEYS, dtype=torch.int32), QUERY, KEYS)
    for shape in (*FIT, *MISFIT):
        with pytest.raises(
            ValueError,
            match=r"^attention_mask: got a torch.int32 tensor .*, allowed: a 2-D mask, or a 4-D",
        ):
            check_mask(torch.zeros(shape, dtype=torch.int32), QUERY, KEYS)


def test_numbers_that_were_made_of_a_mask_of_ours() -> None:
    numbers = torch.zeros(2, 1, 1, KEYS)
    for most in (0.0, 1e6, -torch.inf):
        check_mask(numbers + most, QUERY, KEYS)
    for most in (float(LAST), LAST / 2, torch.nan):
        numbers[0, 0, 0, 3] = most
        with pytest.raises(
            ValueError,
            match=r"^attention_mask: got numbers up to .* \(a model that made them has computed",
        ):
            check_mask(numbers, QUERY, KEYS)


# Models that are refused.


def refusal(config: Any) -> str:
    try:
        model_checks.refuse_foreign_model(config)
    except ValueError as error:
        return str(error)
    return ""


def test_models_that_ignore_the_mask_or_change_it_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_checks, "_foreign", {})  # what other tests found out
    bloom, llama = (
        AutoConfig.for_model(name, attn_implementation="hip") for name in ("bloom", "llama")
    )
    assert refusal(bloom).startswith(
        "attn_implementation: got 'hip' for model type 'bloom', whose language part does not ask"
    )
    assert refusal(bloom) == refusal(AutoConfig.for_model("bloom", attn_implementation="hip")), (
        "the second one of a class as well"
    )
    assert [refusal(config) for config in (None, llama, PreTrainedConfig())] == [""] * 3
    llama.layer_types = ["full_attention", "compressed_sparse_attention"]
    assert refusal(llama).startswith(
        "attn_implementation: got 'hip' for model type 'llama' with compressed layers, which put"
    )
    llama.layer_types = ["full_attention", "indexed_attention"]
    assert refusal(llama) == "indices: llama passes the layer's own sparse indices, allowed: None"
