"""Votes by need: which query rows decide what their query block reads between sink and window.

Most rows of a real model spend their attention on the first tokens and on their neighbours; a few look something up far away.
Whoever asks all rows alike, or their mean, hears the many. The *need* of a row is the share of its attention that lies in the
middle, `sigmoid(lse_middle - lse_near)`:

    sink  [ . . . . middle . . . . ]  window, own block
    \\______________________________________________/
      lse_near: exact, over sink and window (attention computes it anyway)
               lse_middle: estimated, from a sample of the middle's keys

The rows of a query block with the largest need vote, one of every two at most, each with its own query. Where all of them vote
(decode), nothing is estimated: the search weighs every vote by its need (`aggregate` in `hip.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hip_hf.methods.base import squash
from hip_hf.paged import KeyRows, pick
from hip_hf.reference.workers import scratch, widened

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig


# Knuth's multiplier, 2 ** 32 over the golden ratio: neighbouring chunks get offsets that are far apart.
SPREAD = 2654435761


def votes_of(config: HiPConfig, rows: int, heads: int) -> int:
    """How many of `rows` query rows of `heads` heads, which share a selection, vote. A row that is alone (decode) votes with
    all of its heads."""
    if rows == 1:
        return heads
    return min(rows * heads, -(-heads * config.block_q // config.query_stride))


def walkers_of(config: HiPConfig, votes: int) -> int:
    """How many of so many votes by need walk the tree: all, where nothing is scored again at its end."""
    return -(-votes // config.method_options().descent) if config.rescore_blocks else votes


def keep_needier_of_pairs(need: torch.Tensor, heads: int, votes: int) -> None:
    """Take a query block's rows two by two, and set the need of the less needy one to minus infinity, of the later one where they
    are alike, for each head: what a model reads token by token, it looks up in one place, and another row may look elsewhere.

    `need` `[..., rows * heads]`, by position. Nothing is changed where half of the rows are fewer than `votes`."""
    if 2 * votes > need.shape[-1]:
        return
    rows = need.unflatten(-1, (-1, heads))
    later = rows[..., 1::2, :]
    earlier = rows[..., 0::2, :][..., : later.shape[-2], :]
    needier = (later > earlier) | earlier.isnan()
    earlier.masked_fill_(needier, -torch.inf)
    later.masked_fill_(~needier, -torch.inf)


def sampled_chunks(config: HiPConfig, low: int, high: int, level: int) -> tuple[int, int]:
    """First and end of the chunks of `2 ** level` keys that lie in the middle, blocks `low` to `high - 1`."""
    return -(-low * config.block_k >> level), high * config.block_k >> level


def sample_level(config: HiPConfig, low: int, high: int, most: int) -> int:
    """The smallest level at which at most `most` chunks of `2 ** level` keys lie in the middle, blocks `low` to `high - 1`."""
    level = 0
    while True:
        first, end = sampled_chunks(config, low, high, level)
        if end - first <= most:
            return level
        level += 1


def sampled_keys(keys: KeyRows, first: int, end: int, level: int, dtype: torch.dtype) -> torch.Tensor:
    """A key of each chunk `first` to `end - 1` of `2 ** level` keys: `[heads, end - first, D]` of keys `[heads, T, D]`.

    Which one differs from chunk to chunk, so that no pattern in the text hides from the sample, but never changes."""
    chunk = torch.arange(first, end, device=keys.device)
    at = (chunk << level) + ((chunk * SPREAD & 0xFFFFFFFF) >> 32 - level)
    return pick(keys, at.expand(keys.shape[0], -1), 1).to(dtype)


def log_mass(q: torch.Tensor, keys: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Log-sum-exp `[heads, R]` of the logits of scaled queries `[heads, R, D]` for keys `[heads, n, D]`, fp32 at least."""
    logits = torch.bmm(q, keys.transpose(1, 2), out=scratch.take("logits", (*q.shape[:2], keys.shape[1]), q))
    squash(logits, softcap)
    logits = widened(logits)
    highest = logits.amax(-1, keepdim=True)
    return logits.sub_(highest).exp_().sum(-1).log_().add_(highest[..., 0])
