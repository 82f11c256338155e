"""What a method is: its declaration (`Method`), its `Selector`, and the rule that this binds to a
span."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from hip_hf.config import Declared, HiPConfig, refuse
from hip_hf.registry import declare, declared

if TYPE_CHECKING:
    from typing import Self

    from hip_hf.geometry import QueryBlock
    from hip_hf.problem import AttentionProblem
    from hip_hf.rope import Positions
    from hip_hf.state import Summaries


class BoundSelector:
    """A selection rule bound to the queries and keys of one span."""

    def select(self, heads: slice, blocks: list[QueryBlock]) -> Tensor:
        """Sorted indices int64 `[heads, S, len(blocks), budget]` of the key blocks that each query
        block reads.

        `budget` is `Selector.budget`, in blocks: exactly this many, all of them different. A rule
        that picks fewer says so by its `Selector.budget` and by `Method.selected_keys`
        (`streaming.py`). `heads` are key heads; `S` is 1 where the group shares its mask, else the
        number of query heads per key head. Every given query block has more than `budget`
        candidates; where there are fewer, all are read. Where the selector `asks_need`, a third
        argument: `near` `[heads, G, rows]`, log-sum-exp of those of the blocks' rows that may vote
        (`need.asked_rows`) over what they always read.
        """
        raise NotImplementedError

    def chunk_indexed(self, positions: Positions) -> Self:
        """The same rule for the first layers under context extension, where chunks count their
        distance from the window (`rope.py`): itself, where nothing depends on that."""
        return self

    def resume(
        self, heads: slice, blocks: list[QueryBlock], kept: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return what every stage of the search keeps, chunk indices `[heads, S, len(blocks), n]`
        (None: the stage is left out), given what the first `len(kept)` of them kept. Only a rule
        whose method lets `decode_refresh` be a list (`Method.check`) is asked for it."""
        raise NotImplementedError


class Selector:
    """A method's selection rule with the settings bound: which key blocks each query block reads.

    A rule overrides `bind`, and whatever else does not hold for it as it stands here.
    """

    # blocks that it picks, of `block_k` keys each (`HiPConfig.budget` counts keys)
    budget: int
    # whether `bind` and the pyramid may get `PagedKeys`; otherwise a cache in pages is gathered
    reads_pages = False
    # whether what it binds is a `need.BoundSelectorByNeed`
    asks_need = False
    # whether it works under context extension: `bind` then gets keys that are not rotated, and q
    # rotated as if all keys were just outside the window
    extends = False
    # whether its cost counts for query blocks too whose candidates the budget covers
    looks_always = False

    def __init__(self, config: HiPConfig) -> None:
        self.config = config
        self.budget = config.budget_blocks

    def make_pyramid(self, dtype: torch.dtype) -> Summaries | None:
        """An empty pyramid of summaries in `dtype`, or None if the method keeps none."""
        return None

    def bind(
        self,
        q: Tensor,
        keys: Tensor,
        pyramid: Summaries | None,
        scale: float,
        softcap: float | None,
    ) -> BoundSelector:
        """q `[Hkv, G, rows, D]` and keys `[Hkv, T, D]` of one span; `pyramid` covers every query
        block's candidates."""
        raise NotImplementedError

    def cost(self, block: QueryBlock, dim: int) -> tuple[int, int] | None:
        """FLOPs of selecting for one query block, per query head of `dim` numbers, and how many
        numbers are loaded for it. None: nobody has said."""
        return None

    def cost_of_call(self, rows: int, keys: int, dim: int) -> tuple[int, int]:
        """The same of what is computed once for a call of `rows` query rows against `keys` keys."""
        return 0, 0


Options = TypeVar("Options")


@dataclass(frozen=True)
class NoOptions:
    """For methods without settings of their own."""


def options_of(config: HiPConfig, kind: type[Options]) -> Options:
    """The method's own options, for whoever knows that its declaration says `options=kind`."""
    options = config.method_options()
    assert isinstance(options, kind)
    return options


@runtime_checkable
class Checking(Protocol):
    """Options that raise ValueError for settings which do not fit them."""

    def check(self, config: HiPConfig) -> None: ...


def check_settings(config: HiPConfig) -> None:
    """As the method's options do; those that check nothing have no stages either."""
    options = config.method_options()
    if isinstance(options, Checking):
        options.check(config)
    else:
        refuse_stages(config)


def refuse_stages(config: HiPConfig) -> None:
    """Raise ValueError for a list of intervals, one for each stage: the method has no stages."""
    if isinstance(config.decode_refresh, list):
        allowed = f"an integer >= 1 (method {config.method!r} has no stages)"
        refuse("decode_refresh", config.decode_refresh, allowed)


def never_dense(problem: AttentionProblem, config: HiPConfig, decoding: bool) -> tuple[str, bool]:
    """No reason, for a method that serves every call."""
    return "", False


@dataclass(frozen=True)
class Method(Declared):
    """A method, as its module declares it by the name `METHOD`; `hip_hf/registry.py` lists the
    modules.

    Args:
        summary: what it reads besides sink and window, for the table in the documentation.
        selector: the rule that selects. None: an attention of its own, which backends know by name.
        options: the dataclass of its own settings, which validates them.
        check: raises ValueError for settings that the method cannot serve. Options that have a
            `check(config)` are asked; without it, a list of intervals for stages is refused.
        selected_keys: keys that are selected for a query block at most.
        dense_reason: from a problem, settings and whether the call decodes: why the call must be
            dense, or an empty string; and whether for want of support.
        presets: its rows in comparisons (`--settings`) by name, each by the fields that it sets
            besides `method`. Without any, it has one row of its own name.
        sized: from settings and the length of a text: options with which as many keys are read as
            the settings say. None: the budget sees to that.
        reads_all: whether it is dense attention.
    """

    summary: str
    selector: type[Selector] | None = None
    options: type = NoOptions
    check: Callable[[HiPConfig], None] = check_settings
    selected_keys: Callable[[HiPConfig], int] = lambda config: config.budget
    dense_reason: Callable[[AttentionProblem, HiPConfig, bool], tuple[str, bool]] = never_dense
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    sized: Callable[[HiPConfig, int], Mapping[str, int]] | None = None
    reads_all: bool = False

    @property
    def extends(self) -> bool:
        """Whether it works on keys that are not rotated: it compares those outside the window, and
        only with one another."""
        return self.reads_all if self.selector is None else self.selector.extends


def method_of(name: str) -> Method:
    """The declaration of the method `name`. Raises TypeError if its module declares none."""
    method = declared(name)
    if not isinstance(method, Method):
        got = type(method).__name__
        raise TypeError(f"METHOD of {name!r}: got {got}, allowed: hip_hf.methods.base.Method")
    return method


def selector_for(config: HiPConfig) -> Selector:
    """The `Selector` of `config.method`, its settings bound. Raises ValueError if there is none."""
    selector = method_of(config.method).selector
    if selector is None:
        raise ValueError(f"method {config.method!r} selects nothing")
    return selector(config)


def selects(method: str) -> bool:
    """Whether the method says which key blocks it reads."""
    return method_of(method).selector is not None


def summarises(config: HiPConfig) -> bool:
    """Whether the method of `config` keeps summaries of the keys, which decode without kept state
    must make anew."""
    return selects(config.method) and selector_for(config).make_pyramid(torch.float32) is not None


class _Defaults(Selector):
    """What a rule that does not inherit from `Selector` lacks."""

    def __init__(self, config: HiPConfig | None = None) -> None:
        if config is not None:  # else its own `__init__` says `super().__init__()`, and keeps them
            super().__init__(config)


def add_method(name: str, selector: type, options: type = NoOptions) -> None:
    """Make a selection rule of your own known by `name`, to settings, models and measuring commands
    of this process.

    `selector`: a class like `hip_hf.methods.base.Selector`. It need not inherit from that: what it
    lacks is taken from there, `budget` only if it has no `__init__` of its own. With a method
    `cost(block, dim) -> (FLOPs, numbers loaded)` for one query block, `hip-hf
    fidelity` knows what it costs. `options`: a dataclass of its settings; where that has a method
    `check(config)`, it raises ValueError for settings that do not fit them.

    Raises:
        ValueError: the name is taken.
    """
    whole = issubclass(selector, Selector)
    rule = selector if whole else type(selector.__name__, (selector, _Defaults), {})
    summary = (selector.__doc__ or name).strip().partition("\n")[0]
    declare(name, selector.__module__, Method(summary, rule, options))
