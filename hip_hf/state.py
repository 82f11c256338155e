"""`DecodeState`: what attention keeps between the calls of one layer: pyramids, and the selection
that decode reuses."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self

    from hip_hf.config import HiPConfig


class Summaries(Protocol):
    """What a selector keeps of the keys it has seen, the first `blocks` key blocks of `block_k`
    keys (`methods/pyramid.py`). Several batch rows may refer to it (beam search): whoever changes
    it makes a copy first if it is `shared`."""

    shared: bool
    block_k: int
    blocks: int

    @property
    def nbytes(self) -> int:
        """Memory of the summaries."""

    def copy(self) -> Self:
        """An independent copy."""

    def writable(self, blocks: int) -> Self:
        """Itself, or a copy where others refer to it and blocks will be appended to reach
        `blocks`."""

    def extend(self, keys: Tensor, blocks: int) -> None:
        """Summarise the keys `[Hkv, T, D]` up to `blocks` blocks. They may be `PagedKeys`, where
        the selector reads pages."""

    def truncate(self, blocks: int) -> None:
        """Forget all but the first `blocks` blocks."""


@dataclass(frozen=True)
class KeptSelection:
    """Key blocks that the last decode step read: `ids` `[Hkv, S, 1, budget / block_k]`, or None
    where the budget covered all candidates. The window's start and the candidates stay as they were
    when the selection was made.

    With an interval for every stage, `stages` holds what each of them kept, and the position it was
    made for."""

    ids: Tensor | None
    window_start: int
    position: int  # of the row it was made for
    stages: tuple[tuple[Tensor | None, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Correction:
    """Dense minus sparse attention at position `position` (Delta): `out` `[Hkv, G, Dv]`, `lse`
    `[Hkv, G]`, fp32 at least."""

    position: int
    out: Tensor
    lse: Tensor


class DeviceTables(Protocol):
    """What the kernels keep for the batch rows of a cache (`DeviceState` in
    `backends/triton/sparse.py`). `even`: in the last call that the host saw all rows ended at the
    same slot."""

    even: bool

    @property
    def batch(self) -> int:
        """For how many batch rows."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What kernels write for later steps."""

    def crop(self, batch: int, keys: int) -> None:
        """Of the batch row's keys the first `keys` are left; its next step selects anew."""

    def select_anew(self, batch: int) -> None:
        """The selection of the batch row serves no longer."""

    def reorder(self, indices: list[int]) -> None:
        """Batch row `b` continues what row `indices[b]` was."""


@dataclass(eq=False)
class RowState:
    """State of one batch row."""

    key_start: int
    position: int = 0  # one past the last key position seen
    pyramid: Summaries | None = None
    selection: KeptSelection | None = None
    correction: Correction | None = None
    # what the steps under `selection` read: a `DecodeBuffer` of `backends/torch/decode_buffer.py`,
    # whose `buffer_of` says so; here it is but kept and dropped
    decode_buffer: object | None = None
    on_device: bool = False  # what was seen of it is in `DecodeState.device`


_count = itertools.count()
_states: weakref.WeakValueDictionary[int, DecodeState] = weakref.WeakValueDictionary()


def numbered_state(number: Tensor) -> DecodeState:
    """The state with this number, int64 `[]` on the host."""
    return _states[int(number)]


class DecodeState:
    """Kept by the caller between `hip_attention` calls on a growing cache, one per layer.

    It must follow what happens to the cache: `crop`, `reorder` (also for batch selection),
    `repeat`, `reset`. Rows whose keys are not a continuation of what was seen start afresh by
    themselves.
    """

    def __init__(self) -> None:
        self.number: Tensor
        self.rows: dict[int, RowState] = {}
        self._layer: int | None = None  # the first that asked for its own
        self._others: dict[int, DecodeState] = {}  # by the layers that read the same keys
        self.device: DeviceTables | None = None  # for all rows
        # the settings that the state was made with, and the kind of keys
        self._owner: tuple[HiPConfig, int, int, torch.dtype, torch.device] | None = None
        self.__setstate__({})

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """A new state, and each copy, has a number of its own, by which graphs of `torch.compile`
        know it. In a tensor: as a number it would be a constant of the graph."""
        number = next(_count)
        self.__dict__.update(kept, number=torch.tensor(number, device="cpu"))
        _states[number] = self

    def of_layer(self, layer: int | None) -> DecodeState:
        """The state of one of the layers that read the same keys (Gemma 4 reuses those of earlier
        layers): each selects for itself. They follow what happens to the cache with this one."""
        if self._layer is None:
            self._layer = layer
        if layer is None or layer == self._layer:
            return self
        return self._others.setdefault(layer, DecodeState())

    def known(self, layer: int | None) -> DecodeState | None:
        """What `of_layer` would give, if the layer has asked before."""
        return self if layer is None or layer == self._layer else self._others.get(layer)

    def stepping(self, text: str, batch: int) -> bool:
        """Whether all that a step of `batch` rows needs is on the device, made with the settings of
        this `text`."""
        if self.device is None or not self.device.even:
            return False
        if len(self.rows) != batch or self.device.batch != batch:
            return False
        alike = self._owner is not None and self._owner[0].text == text
        return alike and all(row.on_device for row in self.rows.values())

    def reset(self) -> None:
        """Forget everything."""
        self.rows, self.device = {}, None
        for other in self._others.values():
            other.reset()

    def leave_device(self) -> None:
        """The kernels serve no longer: what they keep goes, and the next step selects anew."""
        self.device = None
        for row in self.rows.values():
            if row.on_device:
                row.on_device, row.selection = False, None

    def select_anew(self, batch: int) -> None:
        """The selection that the batch row's steps share serves no longer."""
        row = self.rows.get(batch)
        if row is not None:
            row.selection = None
            if row.on_device and self.device is not None:
                self.device.select_anew(batch)

    def crop(self, length: int) -> None:
        """The cache now holds `length` keys, padding included. The next step selects anew."""
        for other in self._others.values():
            other.crop(length)
        for batch, row in self.rows.items():
            kept = max(0, length - row.key_start)
            # whose steps in a graph have not come to be known here
            if row.on_device and self.device is not None:
                self.device.crop(batch, kept)
            if kept < row.position:
                if row.pyramid is not None and row.pyramid.blocks * row.pyramid.block_k > kept:
                    if row.pyramid.shared:
                        row.pyramid = row.pyramid.copy()
                    row.pyramid.truncate(kept // row.pyramid.block_k)
                row.position, row.selection, row.correction = kept, None, None

    def reorder(self, indices: Tensor | list[int]) -> None:
        """Batch row `b` continues what row `indices[b]` was. Copies refer to the same summaries
        until one of them grows."""
        indices = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        rows = {}
        for to, source in enumerate(indices):
            if source in self.rows:
                row = self.rows[source]
                rows[to] = replace(row)
                if indices.count(source) > 1:
                    if indices.index(source) < to:
                        # it grows with every step: one of them keeps it
                        rows[to].decode_buffer = None
                    if row.pyramid is not None:
                        row.pyramid.shared = True
        self.rows = rows
        if self.device is not None:
            self.device.reorder(indices)
        for other in self._others.values():
            other.reorder(indices)

    def repeat(self, repeats: int) -> None:
        """Every batch row becomes `repeats` neighbouring rows."""
        count = max(self.rows, default=-1) + 1
        self.reorder([b for b in range(count) for _ in range(repeats)])

    def bind(self, config: HiPConfig, k: Tensor) -> None:
        """Start afresh if the settings, or the kind of keys `[B, Hkv, T, D]`, are not those that
        the state was made with."""
        if not self.bound(config, k):
            self.reset()
            self._owner = (config, k.shape[1], k.shape[3], k.dtype, k.device)

    def bound(self, config: HiPConfig, k: Tensor) -> bool:
        """Whether it was made with these settings, for keys like k `[B, Hkv, T, D]`."""
        return self._owner == (config, k.shape[1], k.shape[3], k.dtype, k.device)

    def row(self, batch: int, key_start: int, first: int, end: int) -> RowState:
        """State of a batch row whose call brings queries at positions `first` to `end - 1`."""
        row = self.rows.get(batch)
        if row is None or row.key_start != key_start or row.position != first:
            row = self.rows[batch] = RowState(key_start)
        row.position = end
        return row
