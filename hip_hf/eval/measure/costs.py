"""What attention costs in floating-point operations (a multiply-add is two) and bytes, from settings and geometry alone.

Counted is what grows with the keys: products of queries with keys or chunk summaries (selection) and with keys and values
(attention), and the keys, values and summaries that are loaded for them, once for each query block. Left out is the pyramid, a
few additions per key once, and what is small beside the products: softmax, top-k. Figures are per query head. Where
heads of a group share a selection, each votes with its own rows, so that a head's part of the selection is the same as
when it selects alone; its bytes are as if each head loaded for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

import torch

from hip_hf.backends.clusters import CLUSTERS
from hip_hf.backends.delta import anchors, mode_of
from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, Span, block_read, keys_seen, query_blocks
from hip_hf.methods import hyper, staged
from hip_hf.methods.columns import ROWS_AT_ONCE
from hip_hf.methods.hip import looked_at_whole, start_level
from hip_hf.methods.need import asked_rows, sample_level, sampled_chunks, votes_of, walkers_of
from hip_hf.methods.pyramid import make_representative
from hip_hf.methods.quest import as_tree
from hip_hf.methods.ranking import sampled_rows
from hip_hf.registry import selector_for


@dataclass(frozen=True)
class AttentionCost:
    """Sums over query rows, for one query head. `dense` is what dense attention takes for the same rows."""

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


def _tree(config: HiPConfig, block: QueryBlock, dim: int) -> tuple[int, int]:
    options = config.method_options()
    representative = make_representative(config.representative, options.weight)
    features = representative.features(torch.empty(1, dim)).shape[-1]

    level = start_level(config, block.low, block.high)
    candidates = (block.high >> level) - (-(-block.low >> level))
    scored, exact = candidates, config.rescore_blocks
    for _ in range(level):
        # the halves of what is kept, and a chunk at either edge of the middle
        candidates = 2 * min(config.beam_blocks, candidates) + 2
        scored += candidates
    if looked_at_whole(config, block.low, block.high):
        scored, exact = 0, candidates
    walked, looked = scored * features, min(exact, candidates) * config.block_k * dim
    if config.vote == "sampled":
        return len(sampled_rows(config, block)) * 2 * (walked + looked), walked + looked
    # of one query head: heads that share a mask have as many votes together as alone, but for rounding
    asked, voters, sampled = len(asked_rows(config, block.rows)), votes_of(config, block.rows, 1), 0
    walkers = voters
    if voters < asked:
        walkers = walkers_of(config, voters)
        at = sample_level(config, block.low, block.high, options.sample)
        first, end = sampled_chunks(config, block.low, block.high, at)
        sampled = end - first
    products = walkers * walked + voters * looked + asked * sampled * dim
    return 2 * products, walked + looked + sampled * dim


def _staged(config: HiPConfig, block: QueryBlock, dim: int) -> tuple[int, int]:
    options = config.method_options()
    stages = staged.stages_of(config, options)
    products = loads = 0
    for stage, count in zip(stages, staged.candidates(stages, config.block_k, block.low, block.high), strict=True):
        keys = count * max(2 * staged.descent(stage, options.halvings), 1)
        products += len(range((block.rows - 1) % stage.query_stride, block.rows, stage.query_stride)) * keys
        loads += keys
    return products * 2 * dim, loads * dim


def _h2o(config: HiPConfig, block: QueryBlock, dim: int) -> tuple[int, int]:
    keys = block.sink + min(block.middle, config.budget_blocks) * config.block_k + block.last + 1 - block.window
    return len(sampled_rows(config, block)) * keys * 2 * dim, keys * dim


# FLOPs of choosing the key blocks of one query block, whose middle exceeds the budget, and numbers loaded for that.
SELECTION_COSTS: dict[str, Callable[[HiPConfig, QueryBlock, int], tuple[int, int]]] = {
    "hip": _tree,
    "staged": _staged,
    "quest": lambda config, block, dim: _tree(as_tree(config), block, dim),
    # nothing, or once for the whole call
    **dict.fromkeys(("streaming", "vertical_slash", "sample"), lambda *_: (0, 0)),
    "h2o": _h2o,
    "oracle": lambda _, x, dim: (x.rows * (x.last + 1) * 2 * dim, (x.last + 1) * dim),
}


def once(config: HiPConfig, rows: int, keys: int, dim: int) -> tuple[int, int]:
    """FLOPs of what a selection computes once for a call of `rows` query rows against `keys` keys, and numbers loaded."""
    if config.method == "vertical_slash":
        last = torch.arange(max(0, rows - config.method_options().rows), rows)
    elif config.method == "sample":
        last = config.method_options().sampled(rows)
    else:
        return 0, 0
    parts = [(len(some), int(some[-1]) + keys - rows + 1) for some in last.split(ROWS_AT_ONCE)]
    return sum(n * seen for n, seen in parts) * 2 * dim, sum(seen for _, seen in parts) * dim


def block_cost(
    config: HiPConfig, block: QueryBlock, dim: int, value_dim: int, sliding_window: int | None = None, itemsize: int = 4
) -> AttentionCost:
    """Cost of one query block. Only keys that a row may see count as read, by sparse and dense
    attention alike. Raises ValueError if the method selects no key blocks."""
    if config.method in ("hyper", "dense"):
        raise ValueError(f"method: got {config.method!r}, allowed: a method that selects key blocks")
    selector = selector_for(config)
    budget = selector.budget
    visible = keys_seen(block.first, block.last, sliding_window)
    middle = min(block.middle, budget) * config.block_k
    fixed = block.sink - block.start - block.window + middle
    read = block_read(block, middle, sliding_window)
    selects = block.middle > budget or config.method == "h2o"
    known = SELECTION_COSTS.get(config.method, lambda _, block, dim: selector.cost(block, dim))
    selection, numbers = known(config, block, dim) if selects else (0, 0)
    per_key = 2 * (dim + value_dim)
    loads = [(fixed + block.last + 1) * (dim + value_dim), (block.last + 1 - block.start) * (dim + value_dim)]
    return AttentionCost(
        block.rows, read, visible, selection, read * per_key, visible * per_key, *(n * itemsize for n in (numbers, *loads))
    )


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
    """Cost of the query blocks `blocks` of a call whose rows sit at `first` to `end - 1`: their own, their part of what is
    done once for the call, and Delta's dense rows among theirs, with the clusters where its mode has them."""
    rows = sum(block.rows for block in blocks)
    if config.method == "hyper":
        cost = _hyper(config, blocks, first, end, dim, value_dim, itemsize)
    else:
        cost = total(block_cost(config, block, dim, value_dim, sliding_window, itemsize) for block in blocks)
        flops, numbers = (n * rows // (end - first) for n in once(config, end - first, end, dim))
        cost += AttentionCost(selection=flops, selection_bytes=numbers * itemsize)
    if config.delta is not None:
        clustered = mode_of(config, sliding_window)[0] == "clusters"
        if clustered:
            blocks = [block for block in blocks if block.middle > selector_for(config).budget]
            cost += _clusters(config, blocks, dim, value_dim, itemsize)
        dense = anchors(first, end, config.delta, first if clustered else None)
        dense = [p for p in dense if any(block.first <= p <= block.last for block in blocks)]
        seen = [keys_seen(p, p, sliding_window) for p in dense]
        # rows meet the keys a few at a time: about as many loads as a query block of them makes
        loads = sum(seen[:: config.block_q]) * (dim + value_dim) * itemsize
        cost += AttentionCost(read=sum(seen), attention=sum(seen) * 2 * (dim + value_dim), attention_bytes=loads)
    return cost


def prompt_cost(config: HiPConfig, tokens: int, dim: int = 128) -> AttentionCost | None:
    """Cost of a prompt that a sparse layer without a sliding window reads at once. Shares of it hardly depend on the head dim.
    None for a method that was added without a `cost`."""
    if config.method not in (*SELECTION_COSTS, "hyper") and not hasattr(selector_for(config), "cost"):
        return None
    return call_cost(config, query_blocks(config, Span(0, 0, tokens, 0, tokens, 0), False), 0, tokens, dim, dim)


def _clusters(config: HiPConfig, blocks: Sequence[QueryBlock], dim: int, value_dim: int, itemsize: int) -> AttentionCost:
    """What Delta correction in mode `clusters` takes on top of its dense rows, for query blocks that leave keys out. Keys join
    clusters once for a key head; they count as if once for each query head."""
    blocks = [block for block in blocks if block.window - block.sink >= CLUSTERS]
    if not blocks:
        return AttentionCost()
    joined = blocks[-1].window - blocks[-1].sink
    rows, numbers = sum(block.rows for block in blocks), CLUSTERS * (2 * dim + value_dim)
    taken = len(blocks) * selector_for(config).budget * config.block_k  # keys that are taken out of the clusters
    loads = joined * (2 * dim + value_dim) + taken * (dim + value_dim) + len(blocks) * numbers
    return AttentionCost(attention=2 * (rows * numbers + joined * CLUSTERS * dim), attention_bytes=loads * itemsize)


def _hyper(
    config: HiPConfig, blocks: Sequence[QueryBlock], first: int, end: int, dim: int, value_dim: int, itemsize: int
) -> AttentionCost:
    """HyperAttention's cost for the rows from the first of `blocks` on."""
    since = blocks[0].first
    hashing, attention, read = hyper.flops(config.method_options(), first, end, dim, value_dim, since)
    visible = keys_seen(since, end - 1, None)
    loads = sum(block.last + 1 for block in blocks)
    bytes_each = (dim + value_dim) * itemsize
    # a block of rows loads its own block and the sample; the leaves are dense
    loaded = round(loads * (read / visible)) * bytes_each
    dense = visible * 2 * (dim + value_dim)
    cost = AttentionCost(end - since, read, visible, hashing, attention, dense)
    return cost + AttentionCost(attention_bytes=loaded, dense_bytes=loads * bytes_each)


def total(costs: Iterable[AttentionCost]) -> AttentionCost:
    """The sum of costs."""
    return sum(costs, AttentionCost())
