"""How many digits of its scores the search needs, and what it would keep by the upper half of them
(`selection/topk.py`).

    python benchmarks/top_k_digits.py [--model FOLDER] [--length 32768]

A model (the demo checkpoint) reads the first tokens of the shipped document in one prefill. Of each
selection above the last level: digits of four bits until no more chunks than those kept are left,
and whether the upper four digits, with ties going to the lower position, keep the same chunks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hip_hf
from hip_hf.methods import hip, ranking

ASSETS = Path(hip_hf.__file__).parent / "assets"
DIGITS, BITS = 8, 4


class Counter:
    """Stands for `best`: what `beam` chunks are kept of is counted."""

    def __init__(self, beam: int) -> None:
        self.beam, self.best = beam, ranking.best
        self.selections = self.changed = self.digits = 0

    def __call__(self, scores: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
        kept = self.best(scores, ids, count)
        if count == self.beam < ids.shape[-1]:
            # shares of a softmax: none is below 0
            bits = scores.float().contiguous().view(torch.int32).long()
            least = bits.topk(count).values[..., -1:]
            self.selections += least.numel()
            open_ = torch.ones_like(least)
            for left in reversed(range(0, DIGITS * BITS, BITS)):
                self.digits += int(open_.sum())
                open_ &= ((bits >> left) >= (least >> left)).sum(-1, keepdim=True) > count
            half = DIGITS // 2 * BITS
            coarse = (bits >> half << half).int().view(torch.float32)
            same = self.best(coarse, ids, count).sort().values == kept.sort().values
            self.changed += int((~same.all(-1)).sum())
        return kept


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ASSETS / "checkpoint")
    parser.add_argument("--length", type=int, default=32768)
    given = parser.parse_args()
    config = hip_hf.HiPConfig(dense_below=0, backend="torch")
    model = AutoModelForCausalLM.from_pretrained(given.model, attn_implementation="hip").eval()
    hip_hf.configure(model, config)
    ids = AutoTokenizer.from_pretrained(given.model)((ASSETS / "document.txt").read_text())[
        "input_ids"
    ][: given.length]
    counter = Counter(config.beam_blocks)
    with patch.object(hip, "best", counter):
        model(torch.tensor([ids]), logits_to_keep=1)
    if not counter.selections:
        raise SystemExit(
            f"--length: got {given.length}, "
            "allowed: enough for a level above the last, more than 8192"
        )
    digits, changed = (n / counter.selections for n in (counter.digits, counter.changed))
    print(
        f"{counter.selections} selections: {digits:.2f} digits of {DIGITS} on average, "
        f"by {DIGITS // 2} digits {changed:.1%} keep other chunks"
    )


if __name__ == "__main__":
    main()
