"""A new rule is one file and one line in the registry: everything else knows of it by what it
declares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import methods as table
from figures import not_extending
from fuzz_cases import options
from helpers import assert_near, causal, eager, make_problem, make_qkv, read_mask, small, sparse

from hip_hf.attention import attend
from hip_hf.cli.presets import every, settings_of
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import mass
from hip_hf.eval.measure.costs import prompt_cost
from hip_hf.methods import add_method
from hip_hf.methods.base import method_of
from hip_hf.registry import METHODS, _declared

FILE = """
from dataclasses import dataclass

import torch

from hip_hf.methods import base


@dataclass(frozen=True)
class Options:
    every: int = 2

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(
                f"HiPConfig.options['every']: got {self.every}, allowed: an integer >= 1"
            )


class Selector(base.Selector):
    extends = True

    def bind(self, q, keys, pyramid, scale, softcap):
        return Spread(self.config, 1 if self.config.group_shared else q.shape[1], q.device)

    def cost(self, block, dim):
        return 7 * dim, dim


class Spread(base.BoundSelector):
    def __init__(self, config, masks_per_kv_head, device):
        self.config, self.masks_per_kv_head, self.device = config, masks_per_kv_head, device

    def select(self, heads, blocks):
        count = self.config.budget_blocks
        spread = torch.arange(count, device=self.device)
        ids = [spread * block.num_candidates // count + block.low for block in blocks]
        return torch.stack(ids).expand(heads.stop - heads.start, self.masks_per_kv_head, -1, -1)


METHOD = base.Method(
    "blocks that are spread evenly", Selector, Options,
    presets={"spread": {}, "spread, thin": {"options": {"every": 4}}},
)
"""


class Bare:
    """The first candidates: a rule that takes nothing from this package."""

    def __init__(self, config: HiPConfig) -> None:
        super().__init__()  # as a class may that inherits from nothing
        self.config, self.budget = config, config.budget // config.block_k

    def bind(self, q: torch.Tensor, keys: torch.Tensor, *rest: Any) -> Bare:
        return self

    def select(self, heads: slice, blocks: list[Any]) -> torch.Tensor:
        ids = torch.stack([torch.arange(block.low, block.low + self.budget) for block in blocks])
        return ids.expand(heads.stop - heads.start, 1, -1, -1)


@pytest.fixture
def spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The one file and the one line."""
    (tmp_path / "spread_rule.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "spread", "spread_rule")
    yield "spread"
    _declared.pop("spread", None)
    sys.modules.pop("spread_rule", None)


@pytest.fixture
def bare() -> Iterator[str]:
    add_method("bare", Bare)
    yield "bare"
    METHODS.pop("bare")
    _declared.pop("bare")


def reads_everything_where_the_budget_covers(method: str) -> None:
    tensors = make_qkv(203)
    got = sparse(*tensors, small(method=method, budget=256))
    out, lse = eager(*tensors, causal(1, 203, 203))
    assert_near(got.out, out)
    assert_near(got.lse, lse, what="lse")
    assert got.density == 1


def reads_what_it_selects(method: str) -> None:
    config, tensors = small(method=method), make_qkv(203)
    got = sparse(*tensors, config)
    assert_near(got.out, eager(*tensors, read_mask(got.mask, config, *tensors[:2]))[0])
    assert got.density < 0.8


def test_settings(spread: str) -> None:
    assert HiPConfig(method=spread, options={"every": 3}).method_options().every == 3
    assert HiPConfig(method=spread, extend="streaming").extend == "streaming"
    assert HiPConfig(method=spread).sparse_reach == HiPConfig().sparse_reach
    for fields, says in (
        ({"options": {"every": 0}}, "allowed: an integer >= 1"),
        ({"options": {"evry": 1}}, r"\['every'\] \(options of method 'spread'\)"),
        ({"decode_refresh": [4, 2]}, "method 'spread' has no stages"),
    ):
        with pytest.raises(ValueError, match=says):
            HiPConfig(method=spread, **fields)
    with pytest.raises(ValueError, match=r"allowed: hip \|.* spread"):
        HiPConfig(method="spred")


@dataclass(frozen=True)
class Even:
    """Options that check the settings."""

    def check(self, config: HiPConfig) -> None:
        if config.budget % 64:
            raise ValueError(f"HiPConfig.budget: got {config.budget}, allowed: a multiple of 64")


def test_options_check_the_settings() -> None:
    add_method("checked", Bare, Even)
    try:
        assert HiPConfig(method="checked", budget=128).method_options() == Even()
        with pytest.raises(ValueError, match="got 96, allowed: a multiple of 64"):
            HiPConfig(method="checked", budget=96)
    finally:
        METHODS.pop("checked")
        _declared.pop("checked")


def test_attention(spread: str, bare: str) -> None:
    for method in (spread, bare):
        reads_everything_where_the_budget_covers(method)
        reads_what_it_selects(method)
        tensors = make_qkv(203)
        corrected = attend(make_problem(*tensors), small(method=method, delta=1)).out
        assert_near(corrected, eager(*tensors, causal(1, 203, 203))[0])


def test_comparisons(spread: str, bare: str) -> None:
    assert every()[-3:] == ["spread", "spread, thin", "bare"]
    found = settings_of(["all"], tokens=1000, budget=128)
    assert found["spread, thin"].options == {"every": 4}
    added = [found[name] for name in every()[-3:]]
    assert {(config.method, config.budget) for config in added} == {("spread", 128), ("bare", 128)}
    assert settings_of(["spread"])["spread"].method == "spread"


def test_costs(spread: str, bare: str) -> None:
    problem = make_problem(*make_qkv(203))
    (measured,) = mass.measure_mass(problem, [small(method=spread)])
    assert measured.cost.selection == 7 * 16 * measured.mass.shape[1]
    known = prompt_cost(HiPConfig(method=spread, budget=32), 1000)
    assert known is not None
    assert known.selection > 0
    assert prompt_cost(HiPConfig(method=bare, budget=32), 1000) is None
    with pytest.raises(
        ValueError, match=r"got 'bare', allowed: one whose selector has a `cost\(block, dim\)`"
    ):
        mass.measure_mass(problem, [small(method=bare)])


def test_documentation(spread: str, bare: str) -> None:
    rows = table().splitlines()
    assert "| `spread` | blocks that are spread evenly | `every` |" in rows
    said = "The first candidates: a rule that takes nothing from this package."
    assert f"| `bare` | {said} |  |" in rows
    refusing = not_extending()
    assert "`bare`" in refusing
    assert "`spread`" not in refusing


def test_fuzzing_tries_its_options(spread: str, bare: str) -> None:
    """Values that the options themselves allow, and all of them other than the defaults."""
    assert options("spread", 8, 32) == [{}, {"every": 1}, {"every": 3}]
    assert options("bare", 8, 32) == [{}]


def test_a_file_without_a_declaration_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty_rule.py").write_text("METHOD = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "empty", "empty_rule")
    with pytest.raises(
        TypeError, match=r"METHOD of 'empty': got NoneType, allowed: hip_hf\.methods\.base\.Method"
    ):
        method_of("empty")
    _declared.pop("empty")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_it_reads(method: str) -> None:
    assert f"| `{method}` | {method_of(method).summary} |" in table()
    assert method_of(method).summary
