"""`explain(model)`: what each layer's attention last did, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hip_hf.integration.layer_attention import Call
from hip_hf.integration.model_checks import attention_layers, check_model
from hip_hf.integration.settings import NAMES, attends_by_us, layer_index, text_config
from hip_hf.shown import refused


@dataclass(frozen=True)
class Row:
    """One layer: its path is `sparse`, `dense` or `not called`; `share` is the density: of the
    visible keys, the fraction that was read. `unmasked`: rows of the last batch if no padding mask
    arrived with it (0: one did, or there was a single row)."""

    layer: int | None
    method: str
    path: str
    reason: str
    share: float | None
    cache: str
    unmasked: int = 0


class Report(list[Row]):
    """Rows per layer; `str()` is a table."""

    def __str__(self) -> str:
        head = ("layer", "method", "path", "keys read", "cache", "why dense")
        cells: list[tuple[str, ...]] = [head]
        for row in self:
            layer = "-" if row.layer is None else str(row.layer)
            density = "-" if row.share is None else f"{row.share:.1%}"
            cells.append((layer, row.method, row.path, density, row.cache, row.reason))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, tuple("-" * width for width in widths))
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        unmasked = max((row.unmasked for row in self), default=0)
        if unmasked:
            what = f"No padding mask arrived with the last batch of {unmasked}"
            lines.append(f"{what}: padding, if there is any, was read as text.")
        return "\n".join(lines)


def explain(model: nn.Module) -> Report:
    """Rows per attention layer: method, path of the last call and why, density, kind of cache.

    Raises:
        ValueError: the model does not attend by one of the registered names, or ignores it.
    """
    if not isinstance(model, nn.Module):
        raise refused("model", type(model).__name__, "a pretrained model")
    if not any(attends_by_us(getattr(module, "config", None)) for module in model.modules()):
        got = f"attn_implementation={text_config(model)._attn_implementation!r}"
        raise refused("model", got, " | ".join(NAMES))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            check_model(module, module.config._attn_implementation)
    rows = []
    for module in attention_layers(model):
        what: tuple[Any, ...] = ("-", "not called", "", None, "-")
        call: Call | None = module.__dict__.get("_hip_call")
        if call is not None:
            what = (call.method, call.path, call.reason, call.density, call.cache, call.unmasked)
        rows.append(Row(layer_index(module), *what))
    return Report(rows)
