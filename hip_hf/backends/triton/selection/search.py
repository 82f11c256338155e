"""Launching the tree search (`select.py`): what is settled on the host, from settings and shapes
alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hip_hf.backends.triton.common.addressing import KeyValues
from hip_hf.backends.triton.common.arguments import Logits
from hip_hf.backends.triton.common.rotation import rotation
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.backends.triton.common.tuning import power_of_two, processors, target_of
from hip_hf.backends.triton.pyramid.pyramid import parts_of
from hip_hf.backends.triton.selection.choose import choose_kernel
from hip_hf.backends.triton.selection.select import NEVER, select_kernel
from hip_hf.backends.triton.selection.topk import tile
from hip_hf.backends.triton.selection.votes import votes_of
from hip_hf.backends.triton.selection.voting import Voting
from hip_hf.methods.hip import onward_of
from hip_hf.rope import farthest_chunk

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.rope import Positions

# Candidates of a level for which `SearchTile.rows` is meant: with more, a tile has fewer rows.
CANDIDATES = 512
# Rows of votes that matrix instructions take at least; a decode step has fewer.
FEWEST_ROWS = 16
# The most candidates of a level that a program can hold.
MOST_CANDIDATES = 2048
# Bytes of scratch at most, for start levels longer than a tile (`coarsest`). Where it does not
# serve all programs, they are several launches, one after the other: of 65,536 candidates each 256
# programs, more than an H200 runs at once.
MOST_SCRATCH = 64 * 2**20
# Programs that share the exact look of a decode step's search at most: what more of them save,
# putting it together takes.
MOST_LOOKS = 8
# Warps of a program that puts it together.
CHOOSING_WARPS = 4


@dataclass
class SelectionBuffers:
    """Which key blocks each query block reads. `N` query blocks, `H` mask heads (Hkv if the group
    shares, else Hq).

    indices int32 `[S, H, N, budget / block_k]`, sorted, of which the first counts int32 `[S, H, N]`
    count (0: no such query block); a middle that the budget covers is listed whole. window_start
    int32 `[S, H, N]`: where the window starts. made int32 `[S, H, N]`: in decode, the position that
    a selection was made for.
    """

    NEVER: ClassVar[int] = NEVER.value

    indices: torch.Tensor
    counts: torch.Tensor
    window_start: torch.Tensor
    made: torch.Tensor | None = None
    scratch: torch.Tensor | None = None
    shared: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def empty(
        config: HiPConfig,
        sequences: int,
        heads: int,
        blocks: int,
        device: torch.device,
        keep: bool = False,
    ) -> SelectionBuffers:
        """Not filled yet; with `keep`, one that decode steps share (the first of them selects)."""
        shape = (sequences, heads, blocks)
        indices = torch.empty(*shape, config.budget_blocks, dtype=torch.int32, device=device)
        counts, window = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
        made = (
            torch.full(shape, SelectionBuffers.NEVER, dtype=torch.int32, device=device)
            if keep
            else None
        )
        return SelectionBuffers(indices, counts, window, made)

    def scratch_for(self, count: int) -> torch.Tensor:
        """Scratch of `count` numbers at least. Kept for decode steps, with room to grow: most of
        them allocate nothing."""
        if self.made is None:
            return torch.empty(count, dtype=torch.float32, device=self.counts.device)
        if self.scratch is None or self.scratch.numel() < count:
            with torch.inference_mode(False):
                room = power_of_two(count)
                self.scratch = torch.empty(room, dtype=torch.float32, device=self.counts.device)
        return self.scratch

    def shared_for(self, fixed: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What programs that share a search leave for the launch that chooses, kept for all steps:
        the blocks that are `listed`, int32, and what was `found` in their keys, fp32
        (`select.py`)."""
        if self.shared is None:
            programs, listed = self.counts.numel(), fixed["KEPT_LAST"]
            with torch.inference_mode(False):
                self.shared = (
                    torch.empty(programs * listed, dtype=torch.int32, device=self.counts.device),
                    torch.empty(
                        programs * fixed["FOUND"], dtype=torch.float32, device=self.counts.device
                    ),
                )
        return self.shared


@dataclass(frozen=True)
class SearchTile:
    """A launch of the search: voting `rows` of a tile at most, numbers of the head dim per step at
    the levels (`features`) and in the exact look (`features_last`), warps, pipeline stages. Logits
    of all candidates and `rows` are held in registers."""

    rows: int
    features: int
    features_last: int
    warps: int = 8
    stages: int = 2


def search_tile(
    target: str, dim: int, dtype: torch.dtype, indexed: bool, candidates: int, votes: int
) -> SearchTile:
    """Chosen so that nothing spills in half precision (`hip-hf kernels`); with many `candidates`,
    all of whose logits are held, or more `votes` than a tile has rows, in smaller steps. fp32, and
    chunks that are turned as they are loaded (`indexed`), take several registers where others take
    one. With 16 warps the search stays off Blackwell's tensor memory, whose passes in Triton 3.7
    fail on it."""
    warps = 16 if target.startswith("sm10") else 8
    if indexed or dtype == torch.float32:
        if indexed and votes >= FEWEST_ROWS:
            warps = 8  # with 16 a prompt's search spills
        return SearchTile(
            16, 16, 16, warps, stages=2 if indexed and warps > 8 else 1
        )  # with one stage a step's spills on 16
    if candidates > 2 * CANDIDATES and target.startswith("gfx"):
        wanted = SearchTile(16, 16, 16, stages=1)
    elif candidates > CANDIDATES and not target.startswith(("sm10", "gfx")):
        wanted = SearchTile(16, 16, 32)
    elif target == "sm90":
        # steps of half the size leave room for four in flight: with two, each is waited for before
        # the next is asked for
        wanted = SearchTile(32, 32, 32, stages=4)
    elif target.startswith("sm10"):
        wanted = SearchTile(16, 16, 16, warps)
    elif target.startswith("gfx"):
        wanted = SearchTile(32, 16, 32)
    else:
        # a decode step's search also keeps which blocks follow the best ones; with many candidates
        # larger steps at the levels take fewer registers, for fewer addresses
        wanted = (
            SearchTile(32, 16 if candidates < CANDIDATES else 32, 16)
            if votes < FEWEST_ROWS
            else SearchTile(32, 32, 32)
        )
    if votes > wanted.rows and target != "sm90":  # the loop over tiles takes registers as well
        wanted = replace(wanted, features_last=16)
    return fitted(wanted, dim)


def fitted(tile: SearchTile, dim: int) -> SearchTile:
    """With parts of the head dim that divide it: others cost masks."""
    features, features_last = (
        max(16, min(part, dim & -dim)) for part in (tile.features, tile.features_last)
    )
    return replace(tile, features=features, features_last=features_last)


def constants(
    config: HiPConfig, group: int, dim: int, dtype: torch.dtype, block_q: int, most_keys: int, target: str, stateful: bool,
    positions: Positions | None = None, looks: int = 1, shape: SearchTile | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compile-time arguments of the search. `group`: query heads per key head; `most_keys`: a bound
    on a sequence's keys; `stateful`: decode steps whose selections are kept; `looks`: programs that
    may share an exact look; `shape`: its launch, if not what `search_tile` gives."""
    budget, bk = config.budget_blocks, config.block_k
    keep, most = config.beam_blocks, config.start_blocks
    rescore = config.rescore_blocks > 0
    last = min(config.rescore_blocks, most + 2) if rescore else budget
    limit = 30 if config.coarsest is None else (config.coarsest // bk).bit_length() - 1
    long = most_keys // (bk << limit) > most
    kept, kept_last = tile(keep), tile(last)
    if long:
        kept = max(kept, kept_last)
    voting = Voting.of(config, group, block_q, positions is not None)
    # votes that were put side by side are those of one head
    heads, samples = (
        (1, voting.slots) if voting.chosen else (voting.voters, voting.slots // voting.voters)
    )
    indexed = positions is not None and positions.chunk_indexed
    votes = max(voting.votes, voting.voters)
    shape = (
        fitted(shape, dim) if shape else search_tile(target, dim, dtype, indexed, 2 * kept, votes)
    )
    rows = max(
        FEWEST_ROWS, min(power_of_two(votes), shape.rows, shape.rows * CANDIDATES // (2 * kept))
    )
    # of a whole middle as many logits are held at once
    rows_whole = max(FEWEST_ROWS, rows * kept_last // (2 * kept))
    (tiles, narrow), (tiles_whole, narrow_whole) = (
        (-(-most_votes // count), min(count, power_of_two(most_votes)))
        for most_votes, count in ((votes, rows), (voting.slots, rows_whole))
    )
    if not (stateful and rescore) or long:
        looks = 1
    return dict(
        LOOKS=looks, NARROW=narrow, ROWS_WHOLE=rows_whole, TILES_WHOLE=tiles_whole, NARROW_WHOLE=narrow_whole,
        FOUND=looks * max(tiles * (kept_last + 1) * narrow, tiles_whole * (2 * kept + 1) * narrow_whole),
        BUDGET=budget, KEEP=keep, LAST=last, MOST=most, LIMIT=limit, M=2 * kept, KEPT=kept, KEPT_LAST=kept_last,
        RESCORE=rescore, START_LEVEL_IN_MEMORY=long, BLOCK_Q=block_q, BLOCK_K=bk, HEADS_PER_KEY=group // voting.voters,
        BLOCK_M=rows, TILES=tiles, SAMPLES=samples, STRIDE=1 if voting.chosen else voting.stride, GROUP=heads,
        MASS=config.score == "mass", ONWARD=onward_of(config), WEIGHED=voting.weighed, CHOSEN=voting.chosen, VOTERS=voting.voters,
        VOTES=voting.votes, VOTES_WHOLE=voting.votes_whole, WALKERS=voting.walkers, SPACING=voting.stride, DIM=dim,
        FEATURES=shape.features, FEATURES_LAST=shape.features_last, PARTS=parts_of(config), OUT=tile(budget),
        PRECISION="ieee" if dtype == torch.float32 else "tf32", num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


def choosing(fixed: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `choose_kernel`, from those of the search."""
    return {name: fixed[name] for name in choose_kernel.arg_names if name in fixed} | dict(
        num_warps=CHOOSING_WARPS
    )


def steps_of(fixed: dict[str, Any]) -> int:
    """Steps of a product with a summary. Told at run time: unrolled, the loop would not fit into
    the registers."""
    return fixed["PARTS"] * -(-fixed["DIM"] // fixed["FEATURES"])


def looks_for(programs: int, block_k: int, at_once: int) -> int:
    """How many programs share each of so many searches on a device that runs `at_once`: a power of
    two, so that few kernels are compiled, less what would have no key of a block to look at."""
    looks = 1 << max(0, min(MOST_LOOKS, block_k, at_once // max(1, programs)).bit_length() - 1)
    each = -(-block_k // looks)
    return -(-block_k // each)


def unsupported(config: HiPConfig) -> str:
    """Why the kernels cannot run this search; empty if they can."""
    if config.start_blocks > MOST_CANDIDATES:
        return f"beam * budget / block_k of {config.beam_blocks} is above {MOST_CANDIDATES // 2}"
    if config.rescore_blocks > MOST_CANDIDATES:
        return f"rescore * budget / block_k of {config.rescore_blocks} is above {MOST_CANDIDATES}"
    return ""


def chunk_rotation(
    positions: Positions | None, config: HiPConfig, stand_in: torch.Tensor
) -> dict[str, Any]:
    """Arguments of the search for turning chunks back; what relative positions need, the votes
    have."""
    indexed = positions if positions is not None and positions.chunk_indexed else None
    tables = rotation(indexed, 0, stand_in)
    farthest = 0 if indexed is None else farthest_chunk(indexed, config)
    return {name: tables[name] for name in ("COS", "SIN", "ROPE_HALF_DIM")} | dict(
        farthest=farthest
    )


def select(
    q: torch.Tensor,
    table: torch.Tensor,
    kv: KeyValues,
    sequences: Sequences,
    config: HiPConfig,
    logits: Logits,
    block_q: int,
    into: SelectionBuffers,
    shape: SearchTile | None = None,
) -> None:
    """Fill `into` for all query blocks of `block_q` rows (1 in decode). `shape`: a launch to try.

    q `[B, Hq, Tq, D]` fp16, bf16 or fp32; table `[S, Hkv, rows, width]` as `pyramid.py` makes it;
    nothing waits for the device.
    """
    blocks, heads = sequences.blocks(block_q), into.counts.shape[1]
    programs = at_once = blocks * heads * sequences.count
    looks = looks_for(programs, config.block_k, processors(q))
    call = (q.shape[1] // kv.heads, q.shape[-1], q.dtype, block_q, sequences.max_keys)
    fixed = constants(
        config, *call, target_of(q), into.made is not None, logits.positions, looks, shape
    )
    scratch, listed, stride_scratch = into.counts, into.counts, 0
    if fixed["START_LEVEL_IN_MEMORY"]:
        stride_scratch = sequences.max_keys // (config.block_k << fixed["LIMIT"])
        at_once = min(programs, max(1, MOST_SCRATCH // (stride_scratch * torch.float32.itemsize)))
        scratch = into.scratch_for(at_once * stride_scratch)
    if fixed["LOOKS"] > 1:
        listed, scratch = into.shared_for(fixed)
    block_table, stride_table = kv.table()
    q, near = votes_of(q, kv, sequences, config, logits, block_q, into.made)
    rotations = chunk_rotation(logits.positions, config, q)
    made, settings = (
        into.counts if into.made is None else into.made,
        (config.sink, config.window, logits.sliding_window or 0),
    )
    for first in range(0, programs, max(1, at_once)):
        select_kernel[(min(at_once, programs - first), fixed["LOOKS"])](
            q, table, kv.k, block_table, sequences.table, scratch, into.indices, into.counts, into.window_start,
            made, near, listed, *q.stride()[:3], *kv.strides(kv.k), stride_table,
            sequences.table.stride(0), table.stride(0), table.stride(1), near.shape[-1], stride_scratch, blocks, heads, first,
            logits.scale, *settings, config.decode_refresh, steps_of(fixed),
            STATEFUL=into.made is not None, PAGE_SIZE=kv.page_size, SOFTCAP=logits.softcap or 0.0, **fixed, **rotations,
        )  # fmt: skip
    if fixed["LOOKS"] > 1:
        choose_kernel[(programs,)](
            listed, scratch, sequences.table, near, into.indices, into.counts, into.window_start, made, sequences.table.stride(0),
            near.shape[-1], blocks, heads, *settings, config.decode_refresh, **choosing(fixed),
        )  # fmt: skip
