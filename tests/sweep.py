"""What is checked of every causal-LM and encoder-decoder type of the installed Transformers, and the table in the documentation.

Each type is one of three: *equal* to eager attention in every check, *refused* by an error that says why, or it *cannot be built*
or run here, for a reason that `CANNOT` or Transformers itself gives. `python tests/sweep.py FILE` runs all of them and writes
what came out; `test_families.py` runs them (or a third of them) and compares with that file, from which the documentation
makes its table.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from families import SPARSE
from tiny_configs import HEAD_DIM, VOCAB, tiny_config, types
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

import hip_hf

AUTO = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
LENGTHS = [150, 133]
NEW = 6  # tokens to generate
# Error of the logits that a sum in another order explains, of their largest.
TOLERANCE = 1e-4
# A multiple of the query block that leaves a last chunk of more rows than count as decode.
CHUNK = 64
COVERING = 512

# Types that are in Transformers' lists and cannot run here.
CANNOT: dict[str, str] = {}


class Refused(Exception):
    """The package refused the model."""


class NotApplicable(Exception):
    """Eager attention itself cannot do what the check asks for."""


@dataclass
class Outcome:
    """What came out of one type: `kind` `equal`, `refused`, `cannot be built` or `differs`; `checks`: `yes`, or what else."""

    kind: str
    reason: str = ""
    checks: dict[str, str] = field(default_factory=dict)


@dataclass
class Family:
    """A tiny model of a type, twice, with the same random weights: by eager attention and by `hip`."""

    eager: PreTrainedModel
    ours: PreTrainedModel
    kind: str

    def batch(self, lengths: list[int], right: bool = False) -> dict[str, torch.Tensor]:
        """Random prompts, padded on the left or right; those of an encoder-decoder are of both sides."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            at = slice(length) if right else slice(max(lengths) - length, None)
            ids[row, at] = torch.randint(4, VOCAB - 1, (length,), generator=generator)
            mask[row, at] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.decodes_apart:
            batch |= {"decoder_input_ids": ids.flip(1) if right else ids, "decoder_attention_mask": mask}
            batch["decoder_input_ids"] = ids
        return batch

    @property
    def decodes_apart(self) -> bool:
        """Whether there is an encoder beside the decoder."""
        return bool(self.eager.config.is_encoder_decoder)

    def configure(self, **settings: Any) -> None:
        hip_hf.configure(self.ours, **{**SPARSE, **settings})

    def both(self, call: Callable[[PreTrainedModel], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `call` gives by `hip` and by eager attention."""
        try:
            want = call(self.eager)
        except Exception as error:
            raise NotApplicable(f"eager: {first_line(error)}") from error
        return call(self.ours), want

    def rows(self) -> list[Any]:
        return [row for row in hip_hf.explain(self.ours) if row.path != "not called" and row.reason != "attention is not causal"]


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def names() -> list[tuple[str, str]]:
    """All types, with their kind."""
    return [(kind, name) for kind in AUTO for name in types(kind)]


def build(kind: str, name: str, implementation: str) -> PreTrainedModel:
    """A tiny model of the type, with the same random weights at every call; sharp enough attention for what is read to matter."""
    torch.manual_seed(0)
    model = AUTO[kind].from_config(tiny_config(name, kind), attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(SHARPER)
    model.generation_config.eos_token_id = -1  # never generated: every run has its full length
    return model


SHARPER = 4


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    return model(**batch, **kwargs).logits.float()


def near(got: torch.Tensor, want: torch.Tensor, of: str = "") -> None:
    assert got.shape == want.shape, f"{of}shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not want.isfinite().all():
        raise NotApplicable("eager: numbers that are not finite")
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= TOLERANCE, f"{of}off by {error:.2g}"


def check_prompt(family: Family) -> None:
    """Where everything is read, logits are those of eager attention, through the sparse code where there is full attention."""
    family.configure(budget=COVERING)
    batch = family.batch(LENGTHS[:1])
    near(*family.both(lambda model: logits(model, batch)))
    rows = family.rows()
    assert rows, "no layer attends by hip"
    dense = {row.reason for row in rows if row.path == "dense" and not row.reason.startswith("sliding window")}
    assert not dense, f"dense: {', '.join(sorted(dense))}"


def check_padding(family: Family) -> None:
    """The same in batches padded on the left and on the right."""
    family.configure(budget=COVERING)
    for right in (False, True):
        batch = family.batch(LENGTHS, right)
        real = batch["attention_mask"].bool()
        near(*family.both(lambda model, batch=batch, real=real: logits(model, batch)[real]), of="right: " if right else "left: ")


def check_last_logits(family: Family) -> None:
    """`logits_to_keep=1` gives the last row of logits."""
    if "logits_to_keep" not in inspect.signature(family.eager.forward).parameters:
        raise NotApplicable("no logits_to_keep")
    family.configure(budget=COVERING)
    batch = family.batch(LENGTHS)
    near(*family.both(lambda model: logits(model, batch, logits_to_keep=1)))


def generated(model: PreTrainedModel, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    given = {name: value for name, value in batch.items() if not name.startswith("decoder")}
    return model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)


def check_decode(family: Family, **options: Any) -> None:
    """Greedy tokens are those of eager attention."""
    family.configure(budget=COVERING)
    batch = family.batch(LENGTHS)
    got, want = family.both(lambda model: generated(model, batch, **options))
    assert torch.equal(got, want), "other tokens"


def check_static(family: Family) -> None:
    """The same with a static cache."""
    check_decode(family, cache_implementation="static")


def check_pruned(family: Family) -> None:
    """A pruned run reads a part of the keys in every layer with full attention, and that changes the logits."""
    family.configure()
    batch = family.batch([300])
    got, want = family.both(lambda model: logits(model, batch))
    rows = [row for row in family.rows() if not row.reason.startswith("sliding window")]
    if not rows:
        raise NotApplicable("sliding layers alone")
    assert all(row.path == "sparse" and row.share < 0.8 for row in rows), f"reads {[(row.share, row.reason) for row in rows]}"
    assert float((got - want).abs().max() / want.abs().max()) > 10 * TOLERANCE, "nobody could tell"


def check_state(family: Family) -> None:
    """Decode keeps pyramids and selection: no step rereads all keys."""
    family.configure()
    generated(family.ours, family.batch(LENGTHS))
    rows = [row for row in family.rows() if not row.reason.startswith("sliding window")]
    if not rows:
        raise NotApplicable("sliding layers alone")
    kinds = {row.cache for row in rows} - {"pages", "kept state"}
    assert not kinds, f"read from {', '.join(sorted(kinds))}"


def check_chunks(family: Family) -> None:
    """A pruned prompt read in chunks gives the tokens of one read at once."""
    if family.decodes_apart:
        raise NotApplicable("encoder-decoder")
    family.configure()
    batch = family.batch(LENGTHS[:1])
    family.both(lambda model: generated(model, batch, prefill_chunk_size=CHUNK))
    whole, parts = (generated(family.ours, batch, prefill_chunk_size=size) for size in (None, CHUNK))
    assert torch.equal(whole, parts), "other tokens"


def check_gradients(family: Family) -> None:
    """A training step gives the gradients of eager attention where everything is read."""
    family.configure(budget=COVERING)
    batch = family.batch(LENGTHS[:1])

    def gradients(model: PreTrainedModel) -> torch.Tensor:
        model.zero_grad()
        model(**batch, use_cache=False).logits.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    near(*family.both(gradients))


CHECKS: dict[str, Callable[[Family], None]] = {
    "prompt": check_prompt,
    "padding": check_padding,
    "last logits": check_last_logits,
    "decode": check_decode,
    "static cache": check_static,
    "pruned": check_pruned,
    "kept state": check_state,
    "chunked prefill": check_chunks,
    "gradients": check_gradients,
}


def run(kind: str, name: str) -> Outcome:
    """All checks of one type."""
    try:
        eager = build(kind, name, "eager")
        logits(eager, Family(eager, eager, kind).batch(LENGTHS[:1]))
    except Exception as error:
        return Outcome("cannot be built", CANNOT.get(name, first_line(error)))
    try:
        ours = build(kind, name, "hip")
        ours.load_state_dict(eager.state_dict())
        family = Family(eager, ours, kind)
        family.configure(budget=COVERING)
        logits(ours, family.batch(LENGTHS[:1]))
    except Exception as error:
        return Outcome("refused" if is_refusal(error) else "differs", first_line(error))
    checks = {}
    for title, check in CHECKS.items():
        try:
            check(family)
            checks[title] = "yes"
        except NotApplicable as why:
            checks[title] = f"- {why}"
        except Exception as error:
            checks[title] = f"no: {first_line(error)}"
    return Outcome("differs" if any(said.startswith("no:") for said in checks.values()) else "equal", "", checks)


def is_refusal(error: Exception) -> bool:
    """Whether it is an error of this package about its use, with what was got and what is allowed."""
    return isinstance(error, ValueError) and ", allowed: " in str(error)


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import time
    for kind, name in names():
        if len(sys.argv) > 2 and name not in sys.argv[2:]: continue
        t=time.time()
        out = run(kind, name)
        print(json.dumps([kind, name, round(time.time()-t,1), out.kind, out.reason, out.checks]), flush=True)
