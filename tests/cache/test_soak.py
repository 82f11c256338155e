"""A soak: thousands of random operations on a paged layer against a plain list of tensors, and no
page too many."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from transformers import LlamaConfig

from hip_hf.integration import paged_layer
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.integration.paged_layer import PagedLayer

HEADS, DIM, PAGE = 2, 4, 8
SMALL = dict(num_hidden_layers=1, hip={"window": 16, "sink": 8, "budget": 16, "rescore": 1})


class Twin:
    """A paged layer and, as its model, the keys of each row as a plain tensor. Values are the
    negated keys."""

    def __init__(self, rows: int, offload: str | None = None) -> None:
        config = LlamaConfig(**SMALL)
        config._attn_implementation = "hip"
        cache = HiPCache(config, offload=offload, device_pages=4 if offload else None)
        self.layer: PagedLayer = cache.paged[0]
        self.rows = [torch.zeros(HEADS, 0, DIM) for _ in range(rows)]
        self.most = 0  # pages that were needed at once at some time

    @property
    def length(self) -> int:
        return self.rows[0].shape[1]

    def append(self, count: int) -> None:
        keys = torch.randn(len(self.rows), HEADS, count, DIM)
        self.layer.update(keys, -keys)
        self.rows = [torch.cat([row, new], dim=1) for row, new in zip(self.rows, keys, strict=True)]
        self.most = max(self.most, len(self.rows) * -(-self.length // PAGE))

    def crop(self, count: int) -> None:
        if 0 < count <= self.length and self.length:
            self.layer.crop(-count)
            self.rows = [row[:, : row.shape[1] - count] for row in self.rows]

    def select(self, rows: list[int]) -> None:
        if self.length:
            self.layer.reorder_cache(torch.tensor(rows))
            self.rows = [self.rows[row] for row in rows]

    def check(self) -> None:
        layer = self.layer
        assert layer.get_seq_length() == self.length
        if layer.pool is None:
            return
        assert torch.equal(layer.keys, torch.stack(self.rows))
        assert torch.equal(layer.values, -torch.stack(self.rows))
        pool, named = layer.pool, [page for table in layer.tables for page in table.pages]
        assert pool.used == len(set(named))
        assert sorted(pool.free) == sorted(set(range(len(pool.ref_count))) - set(named))
        assert [named.count(page) for page in range(len(pool.ref_count))] == pool.ref_count
        # room for what was needed at most, half as much again for growth, and for the copies of one
        # append
        assert len(pool.ref_count) <= 1.5 * (self.most + len(self.rows)) + 8


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.before, paged_layer.PAGE = paged_layer.PAGE, PAGE
        self.twin = Twin(3)

    def teardown(self) -> None:
        paged_layer.PAGE = self.before

    @rule(count=st.integers(1, 40))
    def append(self, count: int) -> None:
        self.twin.append(count)

    @rule(count=st.integers(0, 60))
    def crop(self, count: int) -> None:
        self.twin.crop(count)

    @rule(rows=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def select(self, rows: list[int]) -> None:
        self.twin.select(rows)

    @invariant()
    def equal(self) -> None:
        self.twin.check()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_ten_thousand_steps(offload: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_layer, "PAGE", PAGE)
    chance, twin = random.Random(0), Twin(3, offload)
    sizes = []
    for step in range(10_000):
        what = chance.random()
        if what < 0.75:
            twin.append(1)
        elif what < 0.9:
            twin.crop(chance.randrange(1, 7))
        else:
            twin.select([chance.randrange(3) for _ in range(3)])
        if twin.length > 200:
            twin.crop(twin.length - 20)
        if step % 100 == 0:
            twin.check()
        sizes.append(len(twin.layer.pool.ref_count) if twin.layer.pool else 0)
    twin.check()
    assert max(sizes) == sizes[2000]  # whatever it grew to, it had grown to early on
