"""Masks. Transformers asks for one per forward; ours is a row of key positions, O(T), that every layer reduces alike.

`rel` int32 `[B, 1, 1, Tk]`: `rel[b, j]` is the position of key `j` relative to the first query row of the call, or `PAD` where
key `j` is padding. Query row `i` sees key `j` iff `rel <= i` and, in a sliding window, `rel > i - window`. Being 4-D it
passes a second mask creation untouched; it carries padding, offsets and the unfilled slots of static caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import prepare_padding_mask, sdpa_mask

from hip_hf.integration.settings import check_config
from hip_hf.problem import Span

PAD = torch.iinfo(torch.int32).max

# Mask functions that `rel` can say, by the name Transformers gives them.
_CAUSAL = {"causal_mask_function", "sliding_window_overlay", "packed_sequence_mask_function"}
_ALLOWED = "a 2-D mask, or a boolean 4-D one"  # of masks that are not ours
_WRAPPERS = {"and_masks": "mask_functions", "remap_positions_for_packed_sequence": "mask_function"}


def _closed_over(function: Callable[..., Any], name: str) -> Any:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells[name].cell_contents if name in cells else None


def _parts(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The elementary mask functions that `function` intersects, by name."""
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
    use_vmap: bool = False,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """The mask function registered with Transformers.

    Returns `rel` (see above); for patterns that it cannot say (bidirectional, blockwise, chunked, a user's own) the boolean
    `[B, 1, Tq, Tk]`, which makes the attention dense.

    Raises:
        ValueError: the model does not route its attention through Transformers' attention interface, its settings are invalid,
            or the padding mask has another number of rows than the batch. It is the first of us that a forward meets: no
            layer has touched the cache yet.
    """
    refuse_foreign_model(config)
    check_config(config)
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        what = f"got shape {tuple(attention_mask.shape)} for a batch of {batch_size}"
        raise ValueError(f"attention_mask: {what}, allowed: one row of 0 and 1 for each row of the batch")
    parts = _parts(mask_function)
    if use_vmap or not parts.keys() <= _CAUSAL:
        # None would stand for "nothing is hidden" here, and for "causal" elsewhere: always a tensor
        kwargs["allow_is_causal_skip"] = False
        if "allow_is_bidirectional_skip" in kwargs:
            kwargs["allow_is_bidirectional_skip"] = False
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a tensor with static caches
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            use_vmap=use_vmap,
            local_size=local_size,
            device=device,
            **kwargs,
        )
        assert mask is not None  # neither skip was allowed
        return mask
    rel = torch.arange(kv_length, dtype=torch.int32, device=device) + (kv_offset - q_offset)
    rel = rel.to(torch.int32).expand(batch_size, kv_length)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        rel = rel.masked_fill(~padding[:, kv_offset : kv_offset + kv_length].bool(), PAD)
    mask = rel[:, None, None, :]
    if "packed_sequence_mask_function" in parts:
        sequence = _closed_over(parts["packed_sequence_mask_function"], "packed_sequence_mask")
        mask = mask.long()  # not int32: without its spans it must not pass for an unpacked mask
        mask._hip_spans = {q_length: packed_spans(sequence.expand(batch_size, -1))}  # type: ignore[attr-defined]
    mask._hip_window = local_size  # type: ignore[attr-defined]
    return mask


_foreign: dict[type, bool] = {}


def refuse_foreign_model(config: PreTrainedConfig | None) -> None:
    """Raise ValueError for a model that accepts any attention name but ignores it (Bloom, MPT, ...), or changes masks
    (DeepSeek-V4)."""
    if config is None:
        return
    if any("compressed" in kind for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"attn_implementation: got {config._attn_implementation!r} for model type {config.model_type!r} with compressed "
            "layers, which put compressed keys behind the others and extend the mask for them; allowed: `eager`"
        )
    kind = type(config)
    if kind not in _foreign:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

        model = next((m[kind] for m in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING) if kind in m), None)
        can_set = getattr(model, "_can_set_attn_implementation", None)
        _foreign[kind] = can_set is not None and not can_set()
    if _foreign[kind]:
        raise ValueError(
            f"attn_implementation: got {config._attn_implementation!r} for model type {config.model_type!r}, which computes its "
            "attention by itself and would ignore it; allowed: architectures built on Transformers' AttentionInterface "
            "(Llama, Mistral, Qwen, Gemma, Phi, GPT-OSS, ...)"
        )


def packed_spans(sequence: torch.Tensor) -> tuple[Span, ...]:
    """Spans of sequences packed into rows: `sequence` `[B, T]` holds an id that changes where the next one starts."""
    spans = []
    for batch, ids in enumerate(sequence.tolist()):
        start = 0
        for at in range(1, len(ids) + 1):
            if at == len(ids) or ids[at] != ids[start]:
                spans.append(Span(batch, start, at, start, at, 0))
                start = at
    return tuple(spans)


def mask_spans(mask: torch.Tensor, rows: int) -> tuple[Span, ...] | None:
    """Spans that `rel` stands for, or None where padding makes holes in a row. Worked out once per forward.

    Raises:
        ValueError: a mask that is not ours, or that of a packed batch which has lost what it was made with.
    """
    known = getattr(mask, "_hip_spans", None)
    if known is not None and rows in known:
        return known[rows]
    if mask.dtype != torch.int32:
        what = f"got a 4-D {mask.dtype} tensor, the caller's own or a copy of a packed batch's mask"
        raise ValueError(f"attention_mask: {what}, allowed: {_ALLOWED} (or that mask itself)")
    rel = mask[:, 0, 0].cpu()
    if not hasattr(mask, "_hip_window"):  # a copy of ours, or not ours
        origin = (rel - torch.arange(rel.shape[1], dtype=torch.int32))[rel != PAD]
        if len(origin) and not bool((origin == origin[0]).all()):
            raise ValueError(f"attention_mask: got a 4-D {mask.dtype} tensor of the caller's own, allowed: {_ALLOWED}")
    real = rel < rows  # what is beyond the last query is in nobody's sight; padding is as well
    count = real.sum(-1).tolist()
    first = real.int().argmax(-1).tolist()
    spans: list[Span] = []
    holes = False
    for batch, (keys, start) in enumerate(zip(count, first, strict=True)):
        if keys == 0:
            continue
        at, last = int(rel[batch, start]), int(rel[batch, start + keys - 1])
        holes |= last - at != keys - 1 or not bool(real[batch, start : start + keys].all())
        row_start, row_end = max(0, at), min(rows, last + 1)
        if row_start < row_end:
            spans.append(Span(batch, start, start + keys, row_start, row_end, row_start - at))
    result = None if holes else tuple(spans)
    if known is None:
        known = mask._hip_spans = {}  # type: ignore[attr-defined]
    known[rows] = result
    return result


def holds_positions(mask: torch.Tensor) -> bool:
    """Whether it is of integers, as masks of ours are: others are boolean or of numbers to add."""
    return not (mask.dtype == torch.bool or mask.is_floating_point())


def narrowed(mask: torch.Tensor, keys: int) -> torch.Tensor:
    """A mask of ours for the first `keys` keys, with what was attached to it; any other as it is."""
    if mask.shape[-1] <= keys or not holds_positions(mask):
        return mask
    narrow = mask[..., :keys]
    for name in ("_hip_window", "_hip_spans"):
        if hasattr(mask, name):
            setattr(narrow, name, getattr(mask, name))
    return narrow


def check_mask(mask: torch.Tensor, query: torch.Size, keys: int) -> None:
    """Raise ValueError for a mask that does not fit a query of shape `[B, Hq, Tq, D]` and so many keys, or of numbers."""
    batch, heads, rows, _ = query
    if mask.is_floating_point():
        raise ValueError(f"attention_mask: got a 4-D {mask.dtype} tensor, allowed: {_ALLOWED}")
    if mask.dtype == torch.bool:
        fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2] in (1, rows)
        if not fits or mask.shape[3] != keys:
            allowed = f"one that broadcasts to {(batch, heads, rows, keys)}"
            raise ValueError(f"attention_mask: got a boolean mask of shape {tuple(mask.shape)}, allowed: {allowed}")
    elif mask.shape != (batch, 1, 1, keys):
        what = f"got a {mask.dtype} tensor of shape {tuple(mask.shape)} for {batch} rows of {keys} keys"
        raise ValueError(f"attention_mask: {what}, allowed: {_ALLOWED}")


def mask_window(mask: torch.Tensor, given: int | None) -> int | None:
    """The sliding window that a mask of ours was made for; `given`, the layer's own, where it says nothing of one."""
    return getattr(mask, "_hip_window", given)


def visible_rows(mask: torch.Tensor, window: int | None) -> Callable[[int, int], torch.Tensor]:
    """What rows `first` to `last - 1` see, `[B, 1, last - first, Tk]`, of a `rel` or boolean mask: for the dense path."""
    if mask.dtype == torch.bool:
        return lambda first, last: mask if mask.shape[2] == 1 else mask[:, :, first:last]

    def rows(first: int, last: int) -> torch.Tensor:
        row = torch.arange(first, last, device=mask.device)[:, None]
        seen = mask <= row
        return seen if window is None else seen & (mask > row - window)

    return rows
