"""Launching the tree search (`select.py`): what is settled on the host, from settings and shapes
alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hip_hf.backends.triton.common.arguments import Logits
from hip_hf.backends.triton.common.rotation import rotation
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.backends.triton.common.tuning import power_of_two, processors, target_of
from hip_hf.backends.triton.pyramid import vectors_per_summary
from hip_hf.backends.triton.selection.choose import choose_kernel
from hip_hf.backends.triton.selection.select import NEVER, select_kernel
from hip_hf.backends.triton.selection.topk import tile
from hip_hf.backends.triton.selection.votes import select_votes
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
    count (0: no such query block); candidates that the budget covers are listed whole.
    window_start int32 `[S, H, N]`: where the window starts. made int32 `[S, H, N]`: in decode, the
    position that a selection was made for.
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
        config: HiPConfig, shape: tuple[int, int, int], device: torch.device, keep: bool = False
    ) -> SelectionBuffers:
        """For sequences, mask heads and query blocks as in `shape`, not filled yet; with `keep`,
        one that decode steps share (the first of them selects)."""
        indices = torch.empty(*shape, config.budget_blocks, dtype=torch.int32, device=device)
        counts, window = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
        made = torch.full_like(counts, SelectionBuffers.NEVER) if keep else None
        return SelectionBuffers(indices, counts, window, made)

    def scratch_for(self, count: int) -> torch.Tensor:
        """Scratch of `count` numbers at least. Kept for decode steps, with room to grow: most of
        them allocate nothing."""
        if self.made is None:
            return self.counts.new_empty(count, dtype=torch.float32)
        if self.scratch is None or self.scratch.numel() < count:
            with torch.inference_mode(False):
                self.scratch = self.counts.new_empty(power_of_two(count), dtype=torch.float32)
        return self.scratch

    def shared_for(self, fixed: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What programs that share a search leave for the launch that chooses, kept for all steps:
        the blocks that are `listed`, int32, and what was `found` in their keys, fp32
        (`select.py`)."""
        if self.shared is None:
            programs = self.counts.numel()
            with torch.inference_mode(False):
                listed = self.counts.new_empty(programs * fixed["KEPT_LAST"])
                found = self.counts.new_empty(programs * fixed["FOUND"], dtype=torch.float32)
            self.shared = (listed, found)
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
    target: str, dtype: torch.dtype, indexed: bool, candidates: int, votes: int
) -> SearchTile:
    """Chosen so that nothing spills in half precision (`hip-hf kernels`); with many `candidates`,
    all of whose logits are held, or more `votes` than a tile has rows, in smaller steps. fp32, and
    chunks that are rotated as they are loaded (`indexed`), take several registers where others take
    one. With 16 warps the search does not use Blackwell's tensor memory, for which Triton 3.7 fails
    to compile it."""
    warps = 16 if target.startswith("sm10") else 8
    if indexed or dtype == torch.float32:
        if indexed and votes >= FEWEST_ROWS:
            warps = 8  # with 16 a prompt's search spills
        # with one stage a step's spills on 16
        return SearchTile(16, 16, 16, warps, stages=2 if indexed and warps > 8 else 1)
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
    elif votes < FEWEST_ROWS:
        # a decode step's search also keeps which blocks follow the best ones; with many candidates
        # larger steps at the levels take fewer registers, for fewer addresses
        wanted = SearchTile(32, 16 if candidates < CANDIDATES else 32, 16)
    else:
        wanted = SearchTile(32, 32, 32)
    if votes > wanted.rows and target != "sm90":  # the loop over tiles takes registers as well
        wanted = replace(wanted, features_last=16)
    return wanted


def search_constants(
    config: HiPConfig, group: int, dim: int, dtype: torch.dtype, block_q: int, most_keys: int,
    target: str, stateful: bool, positions: Positions | None = None, looks: int = 1,
    shape: SearchTile | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compile-time arguments of the search. `group`: query heads per key head; `most_keys`: a bound
    on a sequence's keys; `stateful`: decode steps whose selections are kept; `looks`: programs that
    may share an exact look; `shape`: its launch, if not what `search_tile` gives. `steps`, those of
    a product with a summary, is told at run time: unrolled, the loop would not fit into the
    registers."""
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
    heads = 1 if voting.chosen else voting.members  # chosen votes lie side by side, as of one head
    indexed = positions is not None and positions.chunk_indexed
    votes = max(voting.votes, voting.members)
    shape = shape or search_tile(target, dtype, indexed, 2 * kept, votes)
    part = max(16, dim & -dim)  # parts of the head dim that do not divide it cost masks
    features, vectors = min(shape.features, part), vectors_per_summary(config)
    held = shape.rows * CANDIDATES // (2 * kept)
    rows = max(FEWEST_ROWS, min(power_of_two(votes), shape.rows, held))
    # of candidates that are looked at whole as many logits are held at once
    rows_whole = max(FEWEST_ROWS, rows * kept_last // (2 * kept))
    (tiles, narrow), (tiles_whole, narrow_whole) = (
        (-(-most_votes // count), min(count, power_of_two(most_votes)))
        for most_votes, count in ((votes, rows), (voting.slots, rows_whole))
    )
    found = max(tiles * (kept_last + 1) * narrow, tiles_whole * (2 * kept + 1) * narrow_whole)
    if not (stateful and rescore) or long:
        looks = 1
    return dict(
        LOOKS=looks, NARROW=narrow, ROWS_WHOLE=rows_whole, TILES_WHOLE=tiles_whole,
        NARROW_WHOLE=narrow_whole, FOUND=looks * found, BUDGET=budget, KEEP=keep, LAST=last,
        MOST=most, LIMIT=limit, M=2 * kept, KEPT=kept, KEPT_LAST=kept_last, RESCORE=rescore,
        START_LEVEL_IN_MEMORY=long, STATEFUL=stateful, BLOCK_Q=block_q, BLOCK_K=bk,
        HEADS_PER_KEY=group // voting.members, BLOCK_M=rows, TILES=tiles,
        SAMPLES=voting.slots // heads, STRIDE=1 if voting.chosen else voting.stride,
        GROUP=heads, MASS=config.score == "mass", ONWARD=onward_of(config), WEIGHED=voting.weighed,
        CHOSEN=voting.chosen, MEMBERS=voting.members, VOTES=voting.votes,
        VOTES_WHOLE=voting.votes_whole, WALKERS=voting.walkers, SPACING=voting.stride, DIM=dim,
        FEATURES=features, FEATURES_LAST=min(shape.features_last, part), PARTS=vectors,
        steps=vectors * -(-dim // features), OUT=tile(budget),
        PRECISION="ieee" if dtype == torch.float32 else "tf32", num_warps=shape.warps,
        num_stages=shape.stages,
    )  # fmt: skip


def choosing(fixed: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `choose_kernel`, from those of the search."""
    given = {name: fixed[name] for name in choose_kernel.arg_names if name in fixed}
    return given | dict(num_warps=CHOOSING_WARPS)


def looks_for(programs: int, block_k: int, at_once: int) -> int:
    """Return how many programs share each of `programs` searches on a device that runs `at_once`: a
    power of two, so that few kernels are compiled, less the programs that would have no key of a
    block to look at."""
    looks = 1 << max(0, min(MOST_LOOKS, block_k, at_once // max(1, programs)).bit_length() - 1)
    each = -(-block_k // looks)
    return -(-block_k // each)


def unsupported_search(config: HiPConfig) -> str:
    """Why the kernels cannot run this search; empty if they can."""
    if config.start_blocks > MOST_CANDIDATES:
        return f"beam * budget / block_k of {config.beam_blocks} is above {MOST_CANDIDATES // 2}"
    if config.rescore_blocks > MOST_CANDIDATES:
        return f"rescore * budget / block_k of {config.rescore_blocks} is above {MOST_CANDIDATES}"
    return ""


def chunk_rotation(
    positions: Positions | None, config: HiPConfig, stand_in: torch.Tensor
) -> dict[str, Any]:
    """Return the arguments with which the search turns chunks back, as `rotation` makes them. With
    relative positions no chunk is rotated, for the votes are. `stand_in`: any tensor on the
    device."""
    indexed = positions if positions is not None and positions.chunk_indexed else None
    tables = rotation(indexed, 0, stand_in)
    del tables["trained"], tables["scaling"]
    return tables | dict(farthest=0 if indexed is None else farthest_chunk(indexed, config))


def select(
    q: torch.Tensor, table: torch.Tensor, kv: KeyValues, sequences: Sequences, config: HiPConfig,
    logits: Logits, block_q: int, into: SelectionBuffers, shape: SearchTile | None = None,
) -> None:  # fmt: skip
    """Fill `into` for all query blocks of `block_q` rows (1 in decode). `shape`: a launch to try.

    q `[B, Hq, Tq, D]` fp16, bf16 or fp32; table `[S, Hkv, rows, width]` as `pyramid.py` makes it;
    nothing waits for the device.
    """
    blocks, heads = sequences.blocks(block_q), into.counts.shape[1]
    programs = at_once = blocks * heads * sequences.count
    looks = looks_for(programs, config.block_k, processors(q))
    call = (q.shape[1] // kv.heads, q.shape[-1], q.dtype, block_q, sequences.max_keys, target_of(q))
    fixed = search_constants(config, *call, into.made is not None, logits.positions, looks, shape)
    scratch, listed, stride_scratch = into.counts, into.counts, 0
    if fixed["START_LEVEL_IN_MEMORY"]:
        stride_scratch = sequences.max_keys // (config.block_k << fixed["LIMIT"])
        at_once = min(programs, max(1, MOST_SCRATCH // (stride_scratch * torch.float32.itemsize)))
        scratch = into.scratch_for(at_once * stride_scratch)
    if fixed["LOOKS"] > 1:
        listed, scratch = into.shared_for(fixed)
    block_table, stride_table = kv.table()
    q, near = select_votes(q, kv, sequences, config, logits, block_q, into.made)
    rotations = chunk_rotation(logits.positions, config, q)
    made = into.counts if into.made is None else into.made
    results = (into.indices, into.counts, into.window_start, made)
    settings = (config.sink, config.window, logits.sliding_window or 0, config.decode_refresh)
    for first in range(0, programs, max(1, at_once)):
        select_kernel[(min(at_once, programs - first), fixed["LOOKS"])](
            q, table, kv.k, block_table, sequences.table, scratch, *results, near, listed,
            *q.stride()[:3], *kv.strides(kv.k), stride_table, sequences.table.stride(0),
            table.stride(0), table.stride(1), near.shape[-1], stride_scratch, blocks, heads, first,
            logits.scale, *settings, PAGE_SIZE=kv.page_size, SOFTCAP=logits.softcap or 0.0, **fixed,
            **rotations,
        )  # fmt: skip
    if fixed["LOOKS"] > 1:
        choose_kernel[(programs,)](
            listed, scratch, sequences.table, near, *results, sequences.table.stride(0),
            near.shape[-1], blocks, heads, *settings, **choosing(fixed),
        )  # fmt: skip
