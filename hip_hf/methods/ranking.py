"""What the selectors share: which rows vote, what their logits make of a candidate together, and
the best of the candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_hf.geometry import QueryBlock
from hip_hf.workers import widened

# Ids are packed into the low half of the sort keys of `best`; the largest of them stands for "no
# chunk".
_LOW_BITS = NO_CHUNK = 0xFFFFFFFF


def squash(logits: Tensor, softcap: float | None) -> None:
    """`softcap * tanh(logits / softcap)`, in place; None: nothing."""
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


def sampled_rows(block: QueryBlock, stride: int) -> range:
    """Every `stride`-th row, counted back from the last."""
    return range(block.row + (block.rows - 1) % stride, block.row + block.rows, stride)


def best(scores: Tensor, ids: Tensor, count: int) -> Tensor:
    """The `count` ids with the highest scores, in no order. Ties go to the lower id; NaN counts as
    lowest.

    scores `[..., M]`, compared in fp32; ids int64 `[..., M]` below 2**32.
    """
    if count >= ids.shape[-1]:
        return ids
    # A float's bits, negative ones flipped, sort like the float; the id below them breaks ties.
    scores = torch.nan_to_num(scores.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    bits = scores.add_(0.0).view(torch.int32)  # adding 0 makes -0 the same as 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (bits.long() << 32) - ids
    return -packed.topk(count, sorted=False).values & _LOW_BITS


def aggregate(
    logits: Tensor,
    score: str,
    softcap: float | None,
    invalid: Tensor | None,
    near: Tensor | None = None,
    size: int = 1,
) -> Tensor:
    """Logits `[..., R, M]` of the voting rows -> one score per candidate, of `size` logits each,
    `[..., M / size]`; overwrites `logits`.

    `mass`: the share of its attention that a row gives the candidate, by a softmax over all of
    them, summed over rows. With `near` `[..., R]`, the log-sum-exp of what a row reads in any case,
    that takes part in the softmax: rows that need nothing far away have no say. The logits then
    have a column more, for it. `max`: best logit of any row (the HiP paper).
    """
    candidates = logits if near is None else logits[..., :-1]
    squash(candidates, softcap)
    if invalid is not None:
        last = candidates[..., candidates.shape[-1] - invalid.shape[-1] :]
        last.masked_fill_(invalid.unsqueeze(-2), -torch.inf)
    if score == "max":
        scores = candidates.amax(-2).to(torch.promote_types(logits.dtype, torch.float32))
        scores = scores if size == 1 else scores.unflatten(-1, (-1, size)).amax(-1)
    else:
        shares = widened(logits)
        if near is not None:
            # of what overflows there is no softmax: such a row has no say either
            torch.clamp(near, max=torch.finfo(shares.dtype).max, out=shares[..., -1])
        scores = torch.softmax(shares, dim=-1, out=shares).sum(-2)[..., : candidates.shape[-1]]
        scores = scores if size == 1 else scores.unflatten(-1, (-1, size)).sum(-1)
    # -inf is for candidates that do not exist; whatever overflowed is merely the worst, or the best
    limit = torch.finfo(torch.float32).max
    scores.nan_to_num_(nan=-limit, posinf=limit, neginf=-limit)
    if invalid is not None:
        invalid = invalid if size == 1 else invalid.unflatten(-1, (-1, size))[..., 0]
        scores[..., scores.shape[-1] - invalid.shape[-1] :].masked_fill_(invalid, -torch.inf)
    return scores


def read_on(scores: Tensor, ids: Tensor, share: float) -> None:
    """Add to the score of each block a share of that of the block before it, if that is there; both
    `[..., M]`, ids sorted.

    What a row looks up need not end with a block, and the rows that read the rest of it need not be
    among the votes. What has overflowed has a negative score, and nothing to share.
    """
    follows = (ids[..., 1:] - ids[..., :-1] == 1) & (ids[..., 1:] != NO_CHUNK)
    scores[..., 1:] += torch.where(follows, scores[..., :-1].clamp(min=0) * share, 0.0)
