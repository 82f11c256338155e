"""Continue a prompt with any checkpoint, and say how long it took and what attention did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hip_hf.eval.measure.memory import MemoryMeter, cache_mib
from hip_hf.geometry import keys_seen
from hip_hf.integration.explain import Report, explain
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.integration.settings import NAMES, text_config
from hip_hf.versions import CACHE


@dataclass
class Generated:
    """New tokens, what they took, and `explain`'s rows after the prompt and after the last token.
    Those after a prompt that was read in chunks have the density of all chunks."""

    ids: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    decode_s: float = 0.0  # for all tokens but the first
    prefill: Report = field(default_factory=Report)
    decode: Report = field(default_factory=Report)
    memory: dict[str, float | None] = field(default_factory=dict)  # MiB, on top of the loaded model

    @property
    def tokens_per_s(self) -> float | None:
        """Of decode; None if there was no step to time."""
        return (len(self.ids) - 1) / self.decode_s if len(self.ids) > 1 else None


class TokenClock:
    """A streamer: `generate` hands it the prompt before it starts, and each token once it has it.
    `text`: another streamer, which gets all that this one gets."""

    def __init__(self, text: BaseStreamer | None = None) -> None:
        self.text = text
        self.generated: list[int] = []
        self.start = self.first = self.last = 0.0

    def put(self, ids: torch.Tensor) -> None:
        now = time.perf_counter()
        if self.text is not None:
            self.text.put(ids)
        if not self.start:
            self.start = time.perf_counter()
            return
        self.generated += ids.flatten().tolist()
        self.first, self.last = self.first or now, now

    def end(self) -> None:
        """Tell the other streamer that the text has ended."""
        if self.text is not None:
            self.text.end()


def explained(model: Any) -> Report:
    """Return `explain(model)`, or an empty report for an attention other than `hip`."""
    return explain(model) if text_config(model)._attn_implementation in NAMES else Report()


def over_chunks(reports: list[tuple[int, Report]], first: int) -> Report:
    """The last of the reports of a prompt's chunks, (rows, report) each, with the keys read of all
    chunks. `first`: the position of the first row."""
    if not reports:
        return Report()
    seen, at = [], first
    for rows, _ in reports:
        seen.append(keys_seen(at, at + rows - 1, None))
        at += rows
    layers = Report()
    for i, last in enumerate(reports[-1][1]):
        densities = [report[i].share for _, report in reports]
        pairs = zip(densities, seen, strict=True)
        read = [density * keys for density, keys in pairs if density is not None]
        layers.append(last if len(read) < len(seen) else replace(last, share=sum(read) / sum(seen)))
    return layers


def generate(
    model: Any,
    prompt: list[int],
    new_tokens: int,
    chunk: int | None = None,
    read: Callable[[int], None] = lambda rows: None,
    cache: HiPCache | None = None,
    text: BaseStreamer | None = None,
    **options: Any,
) -> Generated:
    """Continuation of one prompt by at most `new_tokens` tokens, greedy unless Transformers'
    `options` say otherwise.

    Args:
        chunk: tokens of the prompt that are read at a time, so that memory is that of the cache and
            of one chunk. What follows on a cache that holds something already is read in one piece:
            Transformers 5.17 cannot go on in chunks.
        read: is told how many tokens each forward pass has read.
        cache: holds the prompt's first tokens, which are not read again; afterwards all but the
            last new token. None: a new one.
        text: a streamer that gets the tokens as they come.
    """
    if cache is None and text_config(model)._attn_implementation in NAMES:
        cache = HiPCache(model.config)
    held = 0 if cache is None else cache.get_seq_length()
    result, chunks = Generated(), list[tuple[int, Report]]()

    def note_rows(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        rows = kwargs["input_ids"].shape[1]
        read(rows)
        if not clock.first:
            chunks.append((rows, explained(model)))

    clock = TokenClock(text)
    ids = torch.tensor([prompt], device=model.device)
    given: dict[str, Any] = dict(max_new_tokens=new_tokens, streamer=clock, do_sample=False)
    given |= options
    if chunk is not None and not held:
        given["prefill_chunk_size"] = chunk
    if cache is not None:
        given[CACHE] = cache
    hook = model.register_forward_hook(note_rows, with_kwargs=True)
    meter = MemoryMeter(model.device)
    try:
        with torch.no_grad():
            # only generate knows when the prompt is through: the clock stops inside it, before the
            # first decode step
            model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    finally:
        hook.remove()
    result.ids, result.first_token_s = clock.generated, clock.first - clock.start
    result.decode_s = clock.last - clock.first
    result.prefill, result.decode = over_chunks(chunks, held), explained(model)
    held_mib = None if cache is None else cache_mib(cache)
    peaks = {"peak": meter.peak_mib(), "device_peak": meter.device_peak_mib()}
    result.memory = {"cache": held_mib, **peaks}
    return result


def lengthen(ids: list[int], tokens: int) -> list[int]:
    """Exactly `tokens` of a text's token ids; from its beginning again where it ends."""
    return (ids * -(-tokens // len(ids)))[:tokens]
