"""How much of dense attention a selection captures on one layer's attention problem, beside the
block oracle and its cost.

*Mass* is the share of the dense attention probability that falls on the keys kept (sink, selected
blocks, window). The oracle keeps the blocks with the largest true mass, under the same budget,
sink, window and sharing of heads, so its mass is the most that any selection of blocks reaches.
Only *searched* rows count: those of query blocks with more candidates than the budget. Where the
budget covers all candidates, everything is read and there is nothing to measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hip_hf.attention import attend, dense_reason
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.capture import DENSE
from hip_hf.eval.measure.costs import AttentionCost, call_cost
from hip_hf.geometry import DECODE_ROWS, BlockMask, QueryBlock, Span, query_blocks
from hip_hf.methods.ranking import squash
from hip_hf.problem import AttentionProblem

# Settings that measure the method itself: every layer and row sparse.
SPARSE = {"dense_layers": 0, "dense_tail": 0, "dense_below": 0}
# The fields that say which blocks there are to choose from, and how many may be chosen.
GEOMETRY = ("block_q", "block_k", "sink", "window", "budget", "group_shared")


def searched_blocks(problem: AttentionProblem, config: HiPConfig) -> list[tuple[int, QueryBlock]]:
    """The query blocks of a problem of one span with more candidates than the budget, and their
    places in its `BlockMask`."""
    (span,) = problem.spans
    relative = Span(0, 0, span.keys, 0, span.rows, span.position)
    decodes = problem.q.shape[2] <= DECODE_ROWS
    blocks = enumerate(query_blocks(config, relative, decodes, problem.sliding_window))
    return [(at, block) for at, block in blocks if block.num_candidates > config.budget_blocks]


def probabilities(problem: AttentionProblem, head: int, block: QueryBlock) -> torch.Tensor:
    """Dense attention of a query block, for the query heads of one key head: `[G, rows, keys]`, in
    at least fp32.

    The keys are those from `block.start` to `block.last`. Attention that a layer gives to sink
    logits is left out.
    """
    (span,) = problem.spans
    dtype = torch.promote_types(problem.q.dtype, torch.float32)
    row, key, groups = span.row_start + block.row, span.key_start, problem.groups
    heads = slice(head * groups, (head + 1) * groups)
    q = problem.q[span.batch, heads, row : row + block.rows].to(dtype) * problem.scale
    k = problem.k[span.batch, head, key + block.start : key + block.last + 1].to(dtype)
    logits = q @ k.T
    squash(logits, problem.softcap)
    position = torch.arange(block.start, block.last + 1, device=q.device)
    rows = position[-block.rows :, None]
    logits.masked_fill_(position > rows, -torch.inf)
    if problem.sliding_window is not None:
        logits.masked_fill_(position <= rows - problem.sliding_window, -torch.inf)
    return logits.softmax(-1)


def chosen(problem: AttentionProblem, mask: BlockMask, head: int, at: int) -> torch.Tensor:
    """The key blocks that the `at`-th query block reads, for the query heads of a key head:
    `[G, n]`."""
    (span,) = problem.spans
    by_head = mask.indices[span.batch].unflatten(0, (problem.k.shape[1], -1))
    count = int(mask.counts[span.batch, 0, at])  # the same for all heads
    indices = by_head[head, :, at, :count]  # [1 or G, n]
    return indices.long().expand(problem.groups, -1)


def captured_mass(
    problem: AttentionProblem, blocks: Sequence[tuple[int, QueryBlock]], masks: Sequence[BlockMask]
) -> torch.Tensor:
    """Mass that each mask keeps, averaged over the rows of each block: `[masks, Hq, blocks]`.
    Memory is that of one block."""
    groups = problem.groups
    mass = torch.zeros(len(masks), problem.q.shape[1], len(blocks), dtype=torch.float64)
    for head in range(problem.k.shape[1]):
        for column, (at, block) in enumerate(blocks):
            p = probabilities(problem, head, block).mean(1)  # [G, keys]
            first, end = block.sink_end - block.start, block.window_start - block.start
            always = p[:, :first].sum(-1) + p[:, end:].sum(-1)
            # [G, key blocks]
            searched = p[:, first:end].unflatten(-1, (-1, masks[0].block_k)).sum(-1)
            for i, mask in enumerate(masks):
                ids = chosen(problem, mask, head, at) - block.low
                kept = always + searched.gather(-1, ids).sum(-1)
                mass[i, head * groups : (head + 1) * groups, column] = kept.cpu()
    return mass


def exact_mass(
    problem: AttentionProblem, config: HiPConfig, blocks: Sequence[tuple[int, QueryBlock]]
) -> torch.Tensor:
    """Mass `[Hq, blocks]` of the keys that HyperAttention reads exactly: its denominator without a
    sample, over the true one."""
    own = replace(config, delta=None, options={**config.options, "sample_size": 0})
    part, whole = (attend(problem, c, need_lse=True).lse for c in (own, DENSE))
    assert part is not None
    assert whole is not None
    share = (part.double() - whole.double()).exp()[0]  # [Hq, Tq]
    means = [share[:, block.row : block.row + block.rows].mean(-1) for _, block in blocks]
    return torch.stack(means, dim=1).cpu()


def overlap(
    problem: AttentionProblem,
    blocks: Sequence[tuple[int, QueryBlock]],
    mask: BlockMask,
    oracle: BlockMask,
) -> float:
    """Share of the oracle's blocks that the mask has, too."""
    shares = []
    for head in range(problem.k.shape[1]):
        for at, block in blocks:
            none = problem.q.new_zeros(problem.groups, block.high, dtype=torch.bool)
            picked, best = (chosen(problem, which, head, at) for which in (mask, oracle))
            a, b = none.scatter(1, picked, True), none.scatter(1, best, True)
            shares.append(float((a & b).sum() / b.sum()))
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class MeasuredMass:
    """One setting in one layer on one prompt: mass `[Hq, blocks]` and rows `[blocks]` of its
    searched query blocks; the squared norms of the output's error and of the dense output; the
    overlap with the oracle's blocks; the cost."""

    mass: torch.Tensor
    oracle: torch.Tensor
    rows: torch.Tensor
    error: float
    norm: float
    overlap: float | None  # None: the method chooses no blocks
    cost: AttentionCost


def unsearched(problem: AttentionProblem, configs: Iterable[HiPConfig], layer: int | None) -> str:
    """Why there is nothing to measure in a layer for one of the settings, or an empty string."""
    for config in configs:
        config = config.for_layer(layer)
        reason, _ = dense_reason(problem, config, layer, stateless=True)
        if not reason and not searched_blocks(problem, config):
            reason = f"the budget of {config.budget} covers everything"
        if reason:
            return reason
    return ""


def measure_mass(
    problem: AttentionProblem, configs: Sequence[HiPConfig], layer: int | None = None
) -> list[MeasuredMass]:
    """What each setting captures of one layer's attention. Raises ValueError if a setting has
    nothing to search here (`unsearched` says so beforehand)."""
    dense = attend(problem, DENSE).out
    configs = [config.for_layer(layer) for config in configs]
    by_geometry: dict[tuple[Any, ...], list[int]] = {}
    for i, config in enumerate(configs):
        by_geometry.setdefault(tuple(getattr(config, name) for name in GEOMETRY), []).append(i)
    measured: dict[int, MeasuredMass] = {}
    for geometry, members in by_geometry.items():
        # the oracle takes as many of the same blocks
        choice = {"method": "oracle", **SPARSE, **dict(zip(GEOMETRY, geometry, strict=True))}
        blocks = searched_blocks(problem, configs[members[0]])
        results = [attend(problem, configs[i], layer, need_mask=True) for i in members]
        best = attend(problem, HiPConfig.from_dict(choice), need_mask=True).mask
        if not blocks or best is None or any(result.path != "sparse" for result in results):
            why = unsearched(problem, configs, layer)
            raise ValueError(f"settings: layer {layer} has nothing to search ({why})")
        masks = [best, *(result.mask for result in results if result.mask is not None)]
        by_mask = iter(captured_mass(problem, blocks, masks))
        oracle = next(by_mask)
        mass = [
            exact_mass(problem, configs[i], blocks) if r.mask is None else next(by_mask)
            for i, r in zip(members, results, strict=True)
        ]
        rows = torch.tensor([block.rows for _, block in blocks])
        (span,) = problem.spans
        parts = [torch.arange(block.row, block.row + block.rows) for _, block in blocks]
        at = span.row_start + torch.cat(parts)
        exact = dense[:, :, at].double()
        norm = float(exact.square().sum())
        call = [block for _, block in blocks], span.position, span.end
        dims = problem.q.shape[-1], problem.v.shape[-1], problem.sliding_window
        for i, result, own in zip(members, results, mass, strict=True):
            error = float((result.out[:, :, at].double() - exact).square().sum())
            cost = call_cost(configs[i], *call, *dims, problem.q.element_size())
            share = None if result.mask is None else overlap(problem, blocks, result.mask, best)
            measured[i] = MeasuredMass(own, oracle, rows, error, norm, share, cost)
    return [measured[i] for i in range(len(configs))]
