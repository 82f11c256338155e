"""HyperAttention: what a call shares on all backends (`methods/hyper.py` says what it computes)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hip_hf.backends.keys_read import Reading
from hip_hf.geometry import Span, keys_seen
from hip_hf.methods.hyper import flops
from hip_hf.problem import AttentionProblem

if TYPE_CHECKING:
    from hip_hf.backends.base import Piece
    from hip_hf.config import HiPConfig
    from hip_hf.state import DecodeState


class HyperCall:
    """A call of HyperAttention: problem, settings and results."""

    pieces: list[Piece] | None = None  # there are no gradients

    def __init__(
        self, problem: AttentionProblem, config: HiPConfig, out: torch.Tensor, lse: torch.Tensor | None, mask: bool
    ) -> None:
        self.problem, self.config, self.out, self.lse = problem, config, out, lse
        self.options = config.method_options()
        self.reading = Reading()
        self.mask = None  # there are no key blocks to speak of

    def tail(self, span: Span) -> int:
        """The first of the span's rows that are computed densely."""
        return max(0, span.rows - self.config.dense_tail)

    def note(self, state: DecodeState | None) -> None:
        """What the call means for the state, and how many keys it reads."""
        if state is not None:
            state.bind(self.config, self.problem.k)
        for span in self.problem.spans:
            if state is not None:
                state.row(span.batch, span.key_start, span.position, span.end).selection = None
            tail = self.tail(span)
            read = flops(self.options, span.position, span.position + tail, 1, 1)[2] if tail else 0
            self.reading.read += read + keys_seen(span.position + tail, span.end - 1, None)
            self.reading.visible += keys_seen(span.position, span.end - 1, None)
