"""Fuzzing: sequences of calls on one cache, which grows, is cut, and whose rows are reordered.

Everything is compared with plain attention in float64.

Each step is computed twice: from plain tensors with a `DecodeState`, which tells what it read, and
from a cache in pages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzz_cases import (
    TOLERANCE,
    Draw,
    Shape,
    cases,
    configs,
    covers,
    expected,
    keys_read,
    selected_alone,
    shapes,
)
from helpers import assert_near, make_problem
from hypothesis import given
from hypothesis import strategies as st
from small_pages import MOST, make_layer

from hip_hf import DecodeState
from hip_hf.attention import Result, attend
from hip_hf.config import HiPConfig

pytestmark = pytest.mark.usefixtures("poison")

STATELESS_TOO = (
    "hip",
    "staged",
    "streaming",
    "quest",
    "oracle",
)  # methods whose selection does not depend on earlier calls


class Sequence:
    """The steps of one case, and the keys and values that the cache must hold after each."""

    def __init__(self, shape: Shape, config: HiPConfig, kind: str, seed: int) -> None:
        self.shape, self.config = shape, config
        self.generator = torch.Generator().manual_seed(seed)
        self.starts = list(shape.key_start or [0] * shape.batch)
        self.k = torch.empty(shape.batch, shape.heads, 0, shape.dim, dtype=shape.dtype)
        self.v = torch.empty(shape.batch, shape.heads, 0, shape.dv, dtype=shape.dtype)
        self.state, self.layer = DecodeState(), make_layer(config, kind)

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(len(self.starts), *size, generator=self.generator).to(self.shape.dtype)

    def append(self, count: int) -> None:
        """The next tokens (at first those of the padding at least): what they read must be what
        they say, and attention to it right, whichever cache it comes from."""
        count = max(count, max(self.starts) - self.k.shape[2])
        shape = self.shape
        q = self.random(shape.heads * shape.groups, count, shape.dim)
        k, v = self.random(shape.heads, count, shape.dim), self.random(shape.heads, count, shape.dv)
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        keys, values = self.layer.update(k, v)
        told = self.attend(q, self.k, self.v, self.state, True)
        paged = self.attend(q, keys, values, self.layer.hip_state, False)
        self.check(q, told, paged)
        for kept, mine in ((self.layer.keys, self.k), (self.layer.values, self.v)):
            assert kept is not None
            assert torch.equal(kept, mine)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: DecodeState | None,
        told: bool,
    ) -> Result:
        fields = {"scale": q.shape[-1] ** -0.5} | self.shape.more
        problem = make_problem(q, k, v, self.starts, None, **fields)
        return attend(problem, self.config, None, state, need_lse=told, need_mask=told)

    def check(self, q: torch.Tensor, told: Result, paged: Result) -> None:
        old, config, tolerance = self.shape, self.config, TOLERANCE[q.dtype]
        sizes = dict(
            batch=len(self.starts),
            tokens=self.k.shape[2],
            rows=q.shape[2],
            key_start=self.starts,
            q_start=None,
        )
        shape = Shape(**{**vars(old), **sizes})
        assert (told.path, told.reason) == (paged.path, paged.reason)
        assert told.density == paged.density
        visible = shape.visible()
        if told.path == "sparse" and not covers(config, shape.tokens):
            if not selected_alone(config):
                assert told.out.isfinite().all()
                return
            rows = self.state.rows.items() if shape.rows == 1 else ()
            windows = {
                batch: row.selection.window_start
                for batch, row in rows
                if row.selection is not None
            }
            visible = keys_read(told.mask, config, q, self.k, shape, windows)
        want, want_lse = expected(q, self.k, self.v, shape, visible)
        assert_near(told.out, want, tolerance)
        assert_near(told.lse, want_lse, 3 * tolerance, "lse")
        assert_near(paged.out, want, tolerance, "from pages")
        if (
            config.decode_refresh == 1
            and config.method in STATELESS_TOO
            and told.path == "sparse"
            and config.delta is None
        ):
            alone = self.attend(q, self.k, self.v, None, False)
            if alone.path == "sparse":  # in a sliding window it is dense
                assert_near(alone.out, want, tolerance, "without state")

    def crop(self, count: int) -> None:
        """The last tokens go, but for what padding there is."""
        length = max(max(self.starts), self.k.shape[2] - count)
        if length == self.k.shape[2]:
            return
        self.layer.crop(length - self.k.shape[2])
        self.k, self.v = self.k[:, :, :length], self.v[:, :, :length]
        self.state.crop(length)

    def reorder(self, rows: list[int], how: str) -> None:
        """Other batch rows take the place of what there was."""
        if self.layer.pool is None:
            return
        if how == "repeat":
            rows = [row for row in range(len(self.starts)) for _ in range(2)][:4]
            if len(rows) != 2 * len(self.starts):
                return
            self.layer.batch_repeat_interleave(2)
            self.layer.hip_state.repeat(1)
        elif how == "select":
            self.layer.batch_select_indices(torch.tensor(rows))
        else:
            self.layer.reorder_cache(torch.tensor(rows))
        self.state.reorder(rows)
        self.k, self.v, self.starts = self.k[rows], self.v[rows], [self.starts[row] for row in rows]


@st.composite
def steps(draw: Draw) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [("append", draw(st.sampled_from([1, 16, 17, 40, 64])))]
    for _ in range(draw(st.integers(1, 6))):
        what = draw(st.sampled_from(["step", "step", "append", "crop", "reorder", "reset"]))
        if what == "step":
            found += [("append", 1)] * draw(st.integers(1, 4))
        elif what == "append":
            found.append((what, draw(st.sampled_from([2, 5, 16, 17, 33]))))
        elif what == "crop":
            found.append((what, draw(st.integers(1, 40))))
        elif what == "reorder":
            rows = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
            found.append((what, (rows, draw(st.sampled_from(["reorder", "select", "repeat"])))))
    return found


@cases(0.05)
@given(data=st.data())
def test_one_cache(data: Any) -> None:
    shape, config = data.draw(shapes(most=8)), data.draw(configs())
    kind = data.draw(st.sampled_from(["pages", "pages", "one piece", "offloaded", "small pools"]))
    sequence = Sequence(shape, config, kind, data.draw(st.integers(0, 2**16)))
    for what, value in data.draw(steps()):
        if what == "append" and sequence.k.shape[2] + value <= MOST:
            sequence.append(value)
        elif what == "crop":
            sequence.crop(value)
        elif what == "reorder":
            sequence.reorder([row % len(sequence.starts) for row in value[0]], value[1])
