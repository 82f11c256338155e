"""What attention costs in floating-point operations (a multiply-add is two) and bytes, from
settings and geometry alone.

Counted is what grows with the keys: products of queries with keys or chunk summaries (selection)
and with keys and values (attention), and the keys, values and summaries that are loaded for them,
once for each query block. Left out is the pyramid, a few additions per key once, and what is small
beside the products: softmax, top-k. Figures are per query head. Where heads of a group share a
selection, each votes with its own rows, so that a head's part of the selection is the same as when
it selects alone; its bytes are as if each head loaded for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from hip_hf.backends.delta import anchors
from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, Span, block_read, keys_seen, query_blocks
from hip_hf.methods import hyper
from hip_hf.methods.base import options_of, selector_for, selects


@dataclass(frozen=True)
class AttentionCost:
    """Sums over query rows, for one query head. `dense` is what dense attention takes for the same
    rows."""

    rows: int = 0
    read: int = 0  # keys
    visible: int = 0  # keys
    selection: int = 0  # FLOPs
    attention: int = 0  # FLOPs
    dense: int = 0  # FLOPs
    selection_bytes: int = 0
    attention_bytes: int = 0
    dense_bytes: int = 0

    def __add__(self, other: AttentionCost) -> AttentionCost:
        return AttentionCost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def share(self) -> float:
        """FLOPs of selection and attention together, as a share of dense attention."""
        return (self.selection + self.attention) / self.dense

    @property
    def bytes_share(self) -> float:
        """Bytes of selection and attention together, as a share of dense attention."""
        return (self.selection_bytes + self.attention_bytes) / self.dense_bytes


def block_cost(
    config: HiPConfig,
    block: QueryBlock,
    dim: int,
    value_dim: int,
    sliding_window: int | None = None,
    itemsize: int = 4,
) -> AttentionCost:
    """AttentionCost of one query block. Only keys that a row may see count as read, by sparse and
    dense attention alike.

    Raises:
        ValueError: the method selects no key blocks.
    """
    if not selects(config.method):
        allowed = "a method that selects key blocks"
        raise ValueError(f"method: got {config.method!r}, allowed: {allowed}")
    selector = selector_for(config)
    budget = selector.budget
    visible = keys_seen(block.first, block.last, sliding_window)
    selected = min(block.num_candidates, budget) * config.block_k
    loaded = block.sink_end - block.start + selected + block.last + 1 - block.window_start
    read = block_read(block, selected, sliding_window)
    searched = block.num_candidates > budget or selector.looks_always
    known = selector.cost(block, dim) if searched else (0, 0)
    if known is None:
        allowed = "one whose selector has a `cost(block, dim)`"
        raise ValueError(f"method: got {config.method!r}, allowed: {allowed}")
    selection, numbers = known
    per_key = dim + value_dim
    flops = selection, 2 * read * per_key, 2 * visible * per_key
    loads = numbers, loaded * per_key, (block.last + 1 - block.start) * per_key
    return AttentionCost(block.rows, read, visible, *flops, *(n * itemsize for n in loads))


def call_cost(
    config: HiPConfig,
    blocks: Sequence[QueryBlock],
    first: int,
    end: int,
    dim: int,
    value_dim: int,
    sliding_window: int | None = None,
    itemsize: int = 4,
) -> AttentionCost:
    """Cost of the query blocks `blocks` of a call whose rows sit at `first` to `end - 1`: their
    own, their part of what is done once for the call, and Delta's dense rows among theirs."""
    rows = sum(block.rows for block in blocks)
    if config.method == "hyper":
        cost = _hyper(config, blocks, first, end, dim, value_dim, itemsize)
    else:
        shape = dim, value_dim, sliding_window, itemsize
        cost = total_cost(block_cost(config, block, *shape) for block in blocks)
        whole = selector_for(config).cost_of_call(end - first, end, dim)
        flops, numbers = (n * rows // (end - first) for n in whole)
        cost += AttentionCost(selection=flops, selection_bytes=numbers * itemsize)
    if config.delta is not None:
        dense = anchors(first, end, config.delta, None)
        dense = [p for p in dense if any(block.first <= p <= block.last for block in blocks)]
        seen = [keys_seen(p, p, sliding_window) for p in dense]
        # rows meet the keys a few at a time: about as many loads as a query block of them makes
        loads = sum(seen[:: config.block_q]) * (dim + value_dim) * itemsize
        flops = sum(seen) * 2 * (dim + value_dim)
        cost += AttentionCost(read=sum(seen), attention=flops, attention_bytes=loads)
    return cost


def prompt_cost(config: HiPConfig, tokens: int, dim: int = 128) -> AttentionCost | None:
    """Cost of a prompt that a sparse layer without a sliding window reads at once. Shares of it
    hardly depend on the head dim. None for a method that was added without a `cost`."""
    blocks = query_blocks(config, Span(0, 0, tokens, 0, tokens, 0), False)
    if config.method != "hyper" and selector_for(config).cost(blocks[-1], dim) is None:
        return None
    return call_cost(config, blocks, 0, tokens, dim, dim)


def _hyper(
    config: HiPConfig,
    blocks: Sequence[QueryBlock],
    first: int,
    end: int,
    dim: int,
    value_dim: int,
    itemsize: int,
) -> AttentionCost:
    """HyperAttention's cost for the rows from the first of `blocks` on."""
    since, options = blocks[0].first, options_of(config, hyper.Options)
    hashing, attention, read = hyper.flops(options, first, end, dim, value_dim, since)
    visible = keys_seen(since, end - 1, None)
    loads = sum(block.last + 1 for block in blocks)
    bytes_each = (dim + value_dim) * itemsize
    # a block of rows loads its own block and the sample; the leaves are dense
    loaded = round(loads * (read / visible)) * bytes_each
    dense = visible * 2 * (dim + value_dim)
    cost = AttentionCost(end - since, read, visible, hashing, attention, dense)
    return cost + AttentionCost(attention_bytes=loaded, dense_bytes=loads * bytes_each)


def total_cost(costs: Iterable[AttentionCost]) -> AttentionCost:
    """The sum of costs."""
    return sum(costs, AttentionCost())
