"""HyperAttention: what a call shares on all backends (`methods/hyper.py` says what it computes)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hip_hf.backends.base import Executor
from hip_hf.backends.keys_read import Count, all_keys
from hip_hf.geometry import Span, keys_seen
from hip_hf.methods.base import options_of
from hip_hf.methods.hyper import Options, flops

if TYPE_CHECKING:
    from hip_hf.state import DecodeState


class HyperCall(Executor):
    """A call of HyperAttention. There are no key blocks to speak of in a mask, and no gradients."""

    @property
    def options(self) -> Options:
        """Return the method's own settings."""
        return options_of(self.config, Options)

    @property
    def count(self) -> Count:
        return partial(hyper_keys_read, self.options, self.problem.spans, self.config.dense_tail)

    def note(self, state: DecodeState | None) -> None:
        """What the call means for the state."""
        if state is None:
            return
        state.bind(self.config, self.problem.k)
        for span in self.problem.spans:
            state.row(span.batch, span.key_start, span.position, span.end).selection = None


def hyper_keys_read(options: Options, spans: Sequence[Span], dense_tail: int) -> tuple[int, int]:
    """Keys that HyperAttention and the dense tail read, and keys in sight."""
    read = 0
    for span in spans:
        dense = max(span.position, span.end - dense_tail)
        if dense > span.position:
            read += flops(options, span.position, dense, 1, 1)[2]
        read += keys_seen(dense, span.end - 1, None)
    return read, all_keys(spans, None)[1]
