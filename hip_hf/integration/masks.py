"""Masks. Transformers asks for one per forward; hip's is a *position mask*: a row of key positions,
O(T), that every layer reduces alike.

int32 `[B, 1, 1, Tk]`: `LAST` plus the position of each key relative to the last query row of the
call, or `PAD` where a key is padding. Of `n` query rows, row `i` sees the keys up to
`LAST + i - (n - 1)` and, in a sliding window, none further back than that. Counted from the last
row, because a model may go on with its last rows only (Gemma 4, whose last layers reuse earlier
keys): the mask then still holds. Counted from `LAST`, so that a mask to which a model has added
numbers is found out and refused. Being 4-D it passes a second mask creation untouched; it carries
padding, offsets and the unfilled slots of static caches.

The mask of sequences packed into rows is int64 of the same shape: `LAST` for the keys of a row's
first sequence, `LAST + 1` for those of its second, and so on. The query rows are those of the last
keys.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from hip_hf.geometry import Span
from hip_hf.integration.cache_layers import forget_newest
from hip_hf.integration.extension import refuse_followed
from hip_hf.integration.model_checks import check_config, refuse_foreign_model
from hip_hf.problem import exporting, tracing
from hip_hf.shown import refused

PAD = torch.iinfo(torch.int32).max
LAST = 2**29  # far above any number that masks add, and any context

# Mask functions that positions of keys and rows can say, by the name Transformers gives them.
_CAUSAL = {"causal_mask_function", "sliding_window_overlay", "packed_sequence_mask_function"}
# of masks that are no position masks
_ALLOWED = "a 2-D mask, or a 4-D one of booleans or of numbers to add"
_WRAPPERS = {"and_masks": "mask_functions", "remap_positions_for_packed_sequence": "mask_function"}


def _closed_over(function: Callable[..., Any], name: str) -> Any:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells[name].cell_contents if name in cells else None


def _parts(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The elementary mask functions that `function` intersects, by name."""
    if function is causal_mask_function:  # a graph that is being compiled could not read the name
        return {"causal_mask_function": function}
    name = function.__qualname__.split(".")[0]
    if name not in _WRAPPERS:
        return {name: function}
    inner = _closed_over(function, _WRAPPERS[name]) or ()
    parts: dict[str, Callable[..., Any]] = {}
    for part in inner if isinstance(inner, tuple) else (inner,):
        parts |= _parts(part)
    return parts


def hip_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The mask function registered with Transformers. Returns a row of key positions (see above);
    for patterns that it cannot say (bidirectional, blockwise, chunked, a user's own), and for
    models that go on computing with their mask (Doge) or extend it (T5Gemma 2), the boolean `[B, 1,
    Tq, Tk]`, which makes the attention dense.

    Raises ValueError if the model does not route its attention through Transformers' interface, its
    settings are invalid, or the padding mask has another number of rows than the batch. It is the
    first of hip_hf that a forward meets: no layer has touched the cache yet.
    """
    refuse_followed(config, tracing())
    exported = exporting()  # a graph of tensors alone, which looks at no settings and no functions
    if not exported:
        refuse_foreign_model(config)
        check_config(config)
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        got = f"shape {tuple(attention_mask.shape)} for a batch of {batch_size}"
        raise refused("attention_mask", got, "one row of 0 and 1 for each row of the batch")
    if not torch.compiler.is_compiling():
        forget_newest()
    parts = {} if exported else _parts(mask_function)
    causal = not (exported or kwargs.get("use_vmap")) and parts.keys() <= _CAUSAL
    if not causal or _computes_with_it(config, q_length, parts, kwargs):
        # None would stand for "nothing is hidden" here, and for "causal" elsewhere: always a tensor
        kwargs |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        given: Any = (q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
        mask = sdpa_mask(batch_size, *given, config=config, **kwargs)
        assert mask is not None  # neither skip was allowed
        return mask
    packed = "packed_sequence_mask_function" in parts
    place = kv_offset - q_offset - (q_length - 1)  # of the first key
    if packed:
        sequence = _closed_over(parts["packed_sequence_mask_function"], "packed_sequence_mask")
        row: Any = LAST + sequence.long().expand(batch_size, -1)[:, None, None, :]
    else:
        slots = torch.arange(kv_length, dtype=torch.int32, device=kwargs.get("device", "cpu"))
        places = (slots + (place + LAST)).to(torch.int32).expand(batch_size, kv_length)
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            places = places.masked_fill(~padding[:, kv_offset : kv_offset + kv_length].bool(), PAD)
        row = places[:, None, None, :]
    row._hip_window = kwargs.get("local_size")
    row._hip_unmasked = batch_size if attention_mask is None and batch_size > 1 else 0
    plain = attention_mask is None and isinstance(q_offset, int) and not packed
    if plain and not torch.compiler.is_compiling():
        # without padding all is known, and nothing needs to be read
        end = min(kv_length, q_offset + q_length - kv_offset)
        row._hip_known = [[max(0, end), 0, max(0, end), place, place + end - 1]] * batch_size
    return row


# Known ones, by `model_type`: Doge does not say so before Transformers 5.21, the others may begin
# with a single token.
_COMPUTES_WITH_IT = {"doge", "qwen4_exp_text", "t5gemma2_decoder"}
_computing: set[type] = set()


def _computes_with_it(
    config: PreTrainedConfig | None, rows: int, parts: dict[str, Any], kwargs: dict[str, Any]
) -> bool:
    """Whether the model goes on computing with its mask: it asks Transformers for one in full, even
    where "causal" says all. For a step on a static cache, and for packed sequences, Transformers
    itself asks: models are known by their prompts."""
    asked = not kwargs.get("allow_is_causal_skip", True)
    if asked and rows > 1 and "packed_sequence_mask_function" not in parts:
        _computing.add(type(config))
    return type(config) in _computing or getattr(config, "model_type", None) in _COMPUTES_WITH_IT


def packed_spans(mask: torch.Tensor, rows: int) -> tuple[Span, ...]:
    """Spans of sequences packed into batch rows, whose last `rows` keys are those of the query
    rows. `mask`: the int64 one."""
    spans, before = [], mask.shape[-1] - rows  # keys before the first query row
    for batch, ids in enumerate(mask[:, 0, 0].tolist()):
        end = 0
        for _, same in groupby(ids):
            start, end = end, end + len(list(same))
            first = max(start, before)
            if first < end:
                spans.append(Span(batch, start, end, first - before, end - before, first - start))
    return tuple(spans)


def mask_spans(mask: torch.Tensor, rows: int) -> tuple[Span, ...] | None:
    """Return the spans that a position mask `[B, 1, 1, Tk]` stands for in a call of `rows` query
    rows, or None where padding makes holes in a row. They are worked out once per forward pass.
    Raises ValueError for other integers."""
    known = getattr(mask, "_hip_spans", None)
    if known is not None and rows in known:
        return known[rows]
    if not hasattr(mask, "_hip_window"):  # a copy, or no position mask
        _check_copy(mask)
    result = packed_spans(mask, rows) if mask.dtype == torch.int64 else _padded_spans(mask, rows)
    if known is None:
        known = mask._hip_spans = {}  # type: ignore[attr-defined]
    known[rows] = result
    return result


def _check_copy(mask: torch.Tensor) -> None:
    """Raise ValueError for a mask of integers `[B, 1, 1, Tk]` that does not hold what a copy of a
    position mask would."""
    values = mask[:, 0, 0].cpu()
    fits = False
    if mask.dtype == torch.int64:
        steps = values.diff()
        fits = bool((values[:, 0] == LAST).all() and ((steps == 0) | (steps == 1)).all())
    elif mask.dtype == torch.int32:
        places = torch.arange(values.shape[1], dtype=torch.int32, device="cpu")
        origin = (values - places)[values != PAD]
        fits = len(origin) == 0 or bool((origin == origin[0]).all() and origin[0] > LAST // 2)
    if not fits:
        raise refused("attention_mask", f"a 4-D {mask.dtype} tensor", _ALLOWED)


def _padded_spans(mask: torch.Tensor, rows: int) -> tuple[Span, ...] | None:
    """The spans of key positions, one for each batch row that has any, or None where one of them
    has a hole."""
    spans: list[Span] = []
    known = getattr(mask, "_hip_known", None) or _extents(mask)
    for batch, (keys, start, end, place, last_place) in enumerate(known):
        if keys == 0:
            continue
        at, last = place + rows - 1, last_place + rows - 1  # rows, as the first one is 0
        if last - at != keys - 1 or end - start != keys:
            return None
        row_start, row_end = max(0, at), min(rows, last + 1)
        if row_start < row_end:
            spans.append(Span(batch, start, start + keys, row_start, row_end, row_start - at))
    return tuple(spans)


def keys_in_sight(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each batch row of an int32 position mask, int32 `[B]` on its device: how many keys are in
    sight of the last query row, and the slots of the first and the last of them (of a row without
    any, arbitrary ones)."""
    places = mask[:, 0, 0]
    real = places <= LAST  # what is beyond the last query is in nobody's sight; padding is as well
    slots = torch.arange(places.shape[1], dtype=torch.int32, device=mask.device)
    first = torch.where(real, slots, places.shape[1] - 1).amin(-1)
    last = torch.where(real, slots, 0).amax(-1)
    return real.sum(-1, dtype=torch.int32), first, last


def _extents(mask: torch.Tensor) -> list[list[int]]:
    """Of each batch row: its keys in sight, the slot of the first of them and that behind the last,
    and the places of these two relative to the last query row. Worked out where the mask is; the
    host waits once, for a few numbers."""
    keys, first, last = keys_in_sight(mask)
    ends = mask[:, 0, 0].gather(1, torch.stack([first, last], dim=1).long()) - LAST
    return torch.stack([keys, first, last + 1, *ends.unbind(1)], dim=1).tolist()


def holds_positions(mask: torch.Tensor) -> bool:
    """Whether a mask (of any shape) holds integers, as position masks do. Other masks are boolean
    or hold numbers to add to the logits."""
    return not (mask.dtype == torch.bool or mask.is_floating_point())


def narrowed(mask: torch.Tensor, keys: int) -> torch.Tensor:
    """Return the part `[B, 1, 1, keys]` of a position mask `[B, 1, 1, Tk]` for the first `keys`
    keys, with what is attached to it. Other masks are returned as they are."""
    if mask.shape[-1] <= keys or not holds_positions(mask):
        return mask
    narrow = mask[..., :keys]
    # `_hip_known` counts all keys
    for name in ("_hip_window", "_hip_spans", "_hip_unmasked"):
        if hasattr(mask, name):
            setattr(narrow, name, getattr(mask, name))
    return narrow


def check_mask(mask: torch.Tensor, query: torch.Size, keys: int) -> None:
    """Raise ValueError for a mask that does not fit a query of shape `[B, Hq, Tq, D]` and
    `keys` keys, or that was computed with a position mask."""
    batch, heads, rows, _ = query
    if holds_positions(mask):
        fits, allowed = mask.shape == (batch, 1, 1, keys), _ALLOWED
    else:
        want = (batch, heads, rows, keys)
        fits = mask.ndim == 4 and mask.shape[3] == keys
        fits = fits and all(got in (1, size) for got, size in zip(mask.shape, want, strict=True))
        allowed = f"one that broadcasts to {want}"
    if not fits:
        got = f"a {mask.dtype} tensor of shape {tuple(mask.shape)}"
        raise refused("attention_mask", f"{got} for {batch} rows of {keys} keys", allowed)
    if mask.is_floating_point() and not tracing() and not bool(mask.max() < LAST // 2):
        got = f"numbers up to {mask.max().item():g}"
        got += " (a model that made them has computed with a mask of hip)"
        raise refused("attention_mask", got, "numbers to add to logits")


def unmasked_rows(mask: torch.Tensor | None, batch: int) -> int:
    """Return how many rows of the batch came without a padding mask; 0 for a single one, which
    needs none. `mask` is `[B, 1, 1, Tk]` or None."""
    if mask is None:
        return batch if batch > 1 else 0
    return getattr(mask, "_hip_unmasked", 0)


def mask_window(mask: torch.Tensor, given: int | None) -> int | None:
    """Return the sliding window that a position mask `[B, 1, 1, Tk]` was made for, or the layer's
    own, `given`, for a mask that says nothing of one."""
    return getattr(mask, "_hip_window", given)


def visible_rows(
    mask: torch.Tensor | None, window: int | None, count: int, keys: torch.Tensor
) -> Callable[[int, int], torch.Tensor]:
    """What rows `first` to `last - 1` of `count` query rows see of keys `[B, Hkv, Tk, D]`, for the
    dense path: under any mask, or (None) as the last rows. `[B, Hq or 1, last - first or 1, Tk]`:
    booleans, or what a mask of numbers adds to the logits."""
    if mask is not None and not holds_positions(mask):
        return lambda first, last: mask if mask.shape[2] == 1 else mask[:, :, first:last]
    at: Any = mask
    own = None
    if mask is None or mask.dtype == torch.int64:  # the query rows are those of the last keys
        length = keys.shape[2] if mask is None else mask.shape[3]
        at = torch.arange(length, device=keys.device).view(1, 1, 1, -1) + (LAST - (length - 1))
        own = None if mask is None else mask[..., length - count :].transpose(2, 3)

    def rows(first: int, last: int) -> torch.Tensor:
        row = torch.arange(first, last, device=keys.device)[:, None] + (LAST - (count - 1))
        seen = at <= row
        if window is not None:
            seen = seen & (at > row - window)
        return seen if own is None else seen & (mask == own[:, :, first:last])

    return rows
