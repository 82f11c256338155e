"""`HiPConfig`: every setting of the attention, validated on construction."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn, Protocol, cast

from hip_hf.registry import METHODS, declared
from hip_hf.shown import refused, shown

REPRESENTATIVES = ("blend", "minmax", "middle")
SCORES = ("mass", "max")
VOTES = ("need", "sampled")
# Keys' worth of candidates that the search keeps at a level, and scores exactly at its end, where
# `beam` and `rescore` are None; and the most chunks that these make of smaller blocks.
SEARCHED_KEYS, SEARCHED_CHUNKS = 4096, 1024
BACKENDS = ("auto", "torch", "triton")
# No size is larger: longer than any context, and sums of several still fit into the kernels' 32
# bits.
MOST = 2**28
# A query block meets all its own keys at once, so memory grows with the square of its rows.
MOST_BLOCK_Q = 1024
# What `torch.Generator` takes for a seed.
MOST_SEED = 2**63 - 1
# Levels of lists and mappings in a setting: layers, fields, options, stages, numbers.
MOST_NESTED = 5


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Raise ValueError for a setting: what was got, and what is allowed."""
    raise refused(f"HiPConfig.{name}", shown(value), allowed)


def _check_parts(
    name: str, value: object, most: int | None = None, left: int = MOST_NESTED
) -> None:
    """Raise ValueError for a setting that is nested deeper than any is, which could not be copied,
    or with numbers beyond `most` in it."""
    if most is not None and isinstance(value, int) and abs(value) > most:
        refuse(name, value, f"integers up to {most}")
    if not isinstance(value, (Mapping, list, tuple)):
        return
    if not left:
        refuse(name, value, f"at most {MOST_NESTED} levels of lists and mappings")
    for part in value.values() if isinstance(value, Mapping) else value:
        _check_parts(name, part, most, left - 1)


def _in_range(value: object, low: int, most: int = MOST) -> bool:
    """Whether it is an integer from `low` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= most


class Declared(Protocol):
    """The part of a `hip_hf.methods.base.Method` that settings ask for: methods read settings, so
    that these may not import what a method is."""

    @property
    def options(self) -> type: ...

    @property
    def extends(self) -> bool: ...

    @property
    def check(self) -> Callable[[HiPConfig], None]:
        """Raises ValueError for settings that the method cannot serve."""
        ...

    @property
    def selected_keys(self) -> Callable[[HiPConfig], int]:
        """How many keys are selected for a query block at most."""
        ...


def _method(name: str) -> Declared:
    return cast(Declared, declared(name))


@dataclass(frozen=True)
class HiPConfig:
    """Settings of hierarchically pruned attention. All sizes are in keys (tokens) unless said
    otherwise.

    Args:
        method: the rule that selects keys, or an attention of its own: a name in
            `hip_hf/registry.py`.
        options: the method's own settings, validated by its dataclass (for `hip`: `weight` of the
            bound in `blend`, `sample`: the most keys from which a row's need is estimated; and with
            `rescore`, `descent`: one in `descent` votes by need walks the tree, `onward`: the share
            of a block's `mass` that the block after it gets as well).
        budget: keys selected per query block, a multiple of `block_k`.
        block_q: query rows that share one selection.
        block_k: keys per block, the unit of selection.
        query_stride: every `query_stride`-th row of a query block, or as many rows as that makes,
            votes; every second row where all keys between sink and window are looked at
            (`methods/hip.py`); in decode all heads do.
        vote: who they are: `need` (of every second row those for which a key between sink and
            window stands out most from what they read in any case) or `sampled` (every
            `query_stride`-th row, counted back from the block's last: the papers).
        sink: first keys of a row, always read (rounded up to `block_k`).
        window: keys before the query block, always read.
        group_shared: one selection per KV group instead of one per query head.
        representative: what stands for a chunk of keys in the search: `blend` (centre and spread),
            `minmax` (the bound of its keys alone) or `middle` (its middle key: the HiP paper).
        score: `mass` (the share of its attention that a voting row gives, after what it reads
            anyway, summed over rows) or `max` (best logit: the HiP paper).
        beam: levels above the last keep `beam * budget` keys' worth of chunks; None: 4096 keys'
            worth or 1024 chunks, at least twice the budget. What a search must look at to find an
            answer does not shrink with what is read afterwards.
        rescore: at the last level the best `rescore * budget` keys' blocks are scored with all
            their keys, and where there are no more blocks than the search starts with (twice what
            `beam` keeps), all of them; 1 is off, None: 4096 keys', at least three times the budget.
        coarsest: largest chunk, in keys, that the search may start from; None starts from as few as
            possible.
        dense_layers: a count of first layers, or a list of layer indices, that stay dense.
        dense_below: contexts shorter than this go dense; None takes the backend's measured default,
            0 means never.
        dense_tail: the last rows of each prefill call are computed densely.
        delta: Delta correction: one row in `delta` is dense, and corrects the rows after it; None:
            off.
        delta_mode: `step` (the paper: the last dense row's difference), the only one.
        decode_refresh: decode steps that one selection serves, its own included; for `staged` also
            a list, one per stage.
        extend: None, or `streaming`: contexts longer than the model was trained for (models:
            patched families, and those whose keys can be rotated back; `hip_attention`: with
            `positions`). What a row reads, `sink + budget + window` (no budget for `streaming`),
            must fit in the trained length.
        layers: overrides for single layers, `{layer: {field: value}}`.
        backend: `auto` (on a GPU kernels, or dense attention where these cannot serve or fail their
            self-test; else torch), `torch` (any device), `triton` (kernels without a self-test, or
            an error).

    `from_dict` and `dataclasses.replace` validate as the constructor does.

    Raises:
        ValueError: a field is unknown or out of range; the message names field, value and what is
            allowed.
    """

    method: str = "hip"
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: int = 1024
    block_q: int = 64
    block_k: int = 16
    query_stride: int = 8
    vote: str = "need"
    sink: int = 64
    window: int = 512
    group_shared: bool = True
    representative: str = "blend"
    score: str = "mass"
    beam: int | None = None
    rescore: int | None = None
    coarsest: int | None = None
    dense_layers: int | list[int] = 3
    dense_below: int | None = None
    dense_tail: int = 64
    delta: int | None = None
    delta_mode: str = "step"
    decode_refresh: int | list[int] = 4
    extend: str | None = None
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    backend: str = "auto"
    seed: int = 0

    def __new__(cls, *values: Any, **fields: Any) -> HiPConfig:
        cls._check_names(fields)  # before Python does, whose error does not say what is allowed
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_parts("options", self.options, MOST)
        _check_parts("layers", self.layers)
        self._check_choices()
        self._check_numbers()
        if not isinstance(self.options, Mapping):
            refuse("options", self.options, "a mapping of the method's own settings")
        object.__setattr__(self, "options", copy.deepcopy(dict(self.options)))
        # made once: a graph that is being compiled cannot make it
        object.__setattr__(self, "_options", self._make_options())
        _method(self.method).check(self)
        if self.extend is not None and not _method(self.method).extends:
            allowed = " | ".join(method for method in METHODS if _method(method).extends)
            refuse("method", self.method, f"with `extend`: {allowed}")
        self._check_layers()
        object.__setattr__(self, "_text", json.dumps(self.to_dict()))

    def _check_choices(self) -> None:
        choices = {
            "method": tuple(METHODS),
            "representative": REPRESENTATIVES,
            "score": SCORES,
            "vote": VOTES,
            "delta_mode": ("step",),
            "backend": BACKENDS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                refuse(name, getattr(self, name), " | ".join(allowed))
        if self.extend not in (None, "streaming"):
            refuse("extend", self.extend, "None | streaming")
        if self.extend is not None and self.delta is not None:
            refuse("delta", self.delta, "None with `extend`")
        if not isinstance(self.group_shared, bool):
            refuse("group_shared", self.group_shared, "True or False")

    def _check_numbers(self) -> None:
        at_least = dict(block_q=1, block_k=1, budget=1, query_stride=1)
        at_least |= dict(sink=0, window=0, dense_tail=0, seed=0)
        or_none = dict(beam=1, rescore=1, delta=1, dense_below=0)
        for name, low in (at_least | or_none).items():
            value = getattr(self, name)
            most = {"block_q": MOST_BLOCK_Q, "seed": MOST_SEED}.get(name, MOST)
            if not _in_range(value, low, most) and not (value is None and name in or_none):
                kinds = "None or an integer" if name in or_none else "an integer"
                refuse(name, value, f"{kinds} >= {low}, at most {most}")
        if self.budget % self.block_k:
            refuse("budget", self.budget, f"a multiple of block_k={self.block_k}")
        if self.coarsest is not None:
            within = _in_range(self.coarsest, self.block_k, MOST * self.block_k)
            chunks = self.coarsest // self.block_k if within else 0
            if not chunks or self.coarsest % self.block_k or chunks & (chunks - 1):
                allowed = f"None, or block_k={self.block_k} times a power of two, up to {MOST}"
                refuse("coarsest", self.coarsest, allowed)
        dense = self.dense_layers
        indices = [dense] if isinstance(dense, int) else dense
        if not isinstance(indices, (list, tuple)) or not all(_in_range(i, 0) for i in indices):
            allowed = f"a count >= 0 or a list of layer indices >= 0, at most {MOST}"
            refuse("dense_layers", dense, allowed)
        if not isinstance(dense, int):
            object.__setattr__(self, "dense_layers", list(dense))
        self._check_refresh()

    def _check_refresh(self) -> None:
        refresh = self.decode_refresh
        steps = refresh if isinstance(refresh, (list, tuple)) else [refresh]
        if not steps or not all(_in_range(count, 1) for count in steps):
            allowed = f"an integer >= 1, at most {MOST}, or a list of them, one per stage"
            refuse("decode_refresh", refresh, allowed)
        if any(before % count for before, count in pairwise(steps)):
            allowed = "a list in which every number divides the one before"
            refuse("decode_refresh", refresh, allowed)
        if not isinstance(refresh, int):
            object.__setattr__(self, "decode_refresh", list(steps))

    def _check_layers(self) -> None:
        if not isinstance(self.layers, Mapping):
            refuse("layers", self.layers, "a mapping {layer index: {field: value}}")
        layers = {}
        for key, fields in self.layers.items():
            # Python refuses to read very long numbers
            written = isinstance(key, str) and key.isdecimal() and len(key) <= len(str(MOST))
            index = int(key) if written else key
            if not _in_range(index, 0):
                refuse("layers", key, f"layer indices >= 0 as keys, at most {MOST}")
            if not isinstance(fields, Mapping):
                refuse("layers", fields, f"a mapping of fields for layer {index}")
            if {"layers", "extend"} & fields.keys():
                allowed = "any field but `layers` itself and `extend`, which holds for all layers"
                refuse("layers", dict(fields), allowed)
            if index in layers:
                allowed = f"each layer once (layer {index} is there as a number and as text)"
                refuse("layers", list(self.layers), allowed)
            layers[index] = copy.deepcopy(dict(fields))
        object.__setattr__(self, "layers", layers)
        for index in layers:
            try:
                self.for_layer(index)
            except ValueError as error:
                raise ValueError(f"HiPConfig.layers[{index}]: {error}") from None

    @property
    def budget_blocks(self) -> int:
        """Key blocks that a query block selects."""
        return self.budget // self.block_k

    @property
    def beam_blocks(self) -> int:
        """Chunks that a level of the search above the last one keeps."""
        if self.beam is not None:
            return self.beam * self.budget_blocks
        searched = min(SEARCHED_CHUNKS, -(-SEARCHED_KEYS // self.block_k))
        return max(2 * self.budget_blocks, searched)

    @property
    def start_blocks(self) -> int:
        """Chunks that a search starts with at most. So few blocks need no tree."""
        return 2 * self.beam_blocks

    @property
    def text(self) -> str:
        """The settings as JSON: what graphs that are compiled carry, and what names them."""
        return self._text  # type: ignore[attr-defined]

    @property
    def rescore_blocks(self) -> int:
        """Key blocks that the search scores with all their keys at its last level; 0: none are."""
        if self.rescore is None:
            return max(3 * self.budget_blocks, -(-SEARCHED_KEYS // self.block_k))
        return self.rescore * self.budget_blocks if self.rescore > 1 else 0

    @property
    def selected_keys(self) -> int:
        """Keys that are selected for a query block at most: the budget, where the method spends
        it."""
        return _method(self.method).selected_keys(self)

    @property
    def sink_end(self) -> int:
        """Where the first keys end that every row reads: `sink`, in whole key blocks."""
        return -(-self.sink // self.block_k) * self.block_k

    @property
    def sparse_reach(self) -> int:
        """Keys that the sparse path reads for a row at most: a context up to this long it reads
        whole."""
        return self.sink + self.selected_keys + self.window

    def method_options(self) -> object:
        """The method's own options as its dataclass, which `methods.base.options_of` names."""
        return self._options  # type: ignore[attr-defined]

    def _make_options(self) -> Any:
        """Raises ValueError for unknown or invalid ones."""
        kind = _method(self.method).options
        known = [f.name for f in dataclasses.fields(kind)]
        for name in self.options:
            if name not in known:
                refuse("options", name, f"{known or 'none'} (options of method {self.method!r})")
        return kind(**self.options)

    def for_layer(self, layer: int | None) -> HiPConfig:
        """The settings that hold in one layer: overrides applied. `None` gives the settings
        themselves."""
        override = self.layers.get(layer) if layer is not None else None
        if not override:
            return self
        return HiPConfig.from_dict({**self.to_dict(), "layers": {}, **override})

    def is_dense_layer(self, layer: int | None) -> bool:
        """Whether `layer` is one of `dense_layers`."""
        dense = self.dense_layers
        if layer is None:
            return False
        return layer < dense if isinstance(dense, int) else layer in dense

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict; layer indices become strings, as they are in JSON."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        values["layers"] = {str(index): fields for index, fields in values["layers"].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HiPConfig:
        """The inverse of `to_dict`; fields left out take their defaults. Raises ValueError for
        unknown fields."""
        if not isinstance(values, Mapping):
            got = type(values).__name__
            raise ValueError(f"HiPConfig.from_dict: got {got}, allowed: a mapping of fields")
        cls._check_names(values)  # names that are no text, too
        return cls(**values)

    @classmethod
    def _check_names(cls, values: Mapping[str, Any]) -> None:
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                label = shown(name).strip("'")
                close = difflib.get_close_matches(label, known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                got = f"unknown field with value {shown(values[name])}{hint}"
                raise ValueError(f"HiPConfig.{label}: {got}, allowed: {known}")
