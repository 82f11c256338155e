"""What is checked of every causal-LM and encoder-decoder type of the installed Transformers, and
the table in the documentation.

A type is *equal* to eager attention in every check that eager attention itself passes, or *refused*
by an error that says why, or it *cannot be built* or run here, with the reason.
`python tests/lib/sweep.py` writes what came out of all types to `RECORD`, from which the
documentation makes its table; `test_families.py` holds each type to it.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from families import SPARSE, make_llava, make_qwen2_vl
from repository import ROOT
from tiny_configs import VOCAB, tiny_config, types
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
# What matrices are multiplied by: attention of a fresh initialisation is so flat that it hardly
# matters what is read.
SHARPER = 4

# Wrappers of vision and language, here with text alone; `test_multimodal.py` shows them images.
WRAPPERS: dict[str, Callable[[Any], PreTrainedModel]] = {
    "llava": make_llava,
    "qwen2_vl": make_qwen2_vl,
}
# What is not so, by type and check, and why: it must be so, or else the entry is wrong.
_CHUNKED, _BLOCKS = (
    "layers of chunked attention are dense",
    "masks that let an image's tokens see one another are dense",
)
_COMPUTES = "a model that goes on computing with its mask is dense"
_MERGED = "its decoder attends to its own keys and the encoder's at once, which is dense"
_DENSE = ("prompt", "pruned", "kept state")
LIMITS: dict[tuple[str, str], str] = {
    ("minimax", "kept state"): "its cache is a class of its own",
    ("moshi", "kept state"): "its cache drops old keys",
    **{(name, check): _CHUNKED for name in ("llama4", "llama4_text") for check in _DENSE},
    **{("gemma4_unified", check): _BLOCKS for check in _DENSE},
    **{("doge", check): _COMPUTES for check in _DENSE},
    ("t5gemma2", "prompt"): _MERGED,
}
# Types whose eager model fails here, where its own error does not say why.
CANNOT = {
    "dots3_note": "its default config has settings for layers that a tiny model does not have",
    "gemma3n": "its part for images needs timm",
    "gemma4_assistant": "it reads the keys of another model",
    "gemma4_unified_assistant": "it reads the keys of another model",
    "musicgen": "Transformers' causal class is of its decoder's config",
    "musicgen_melody": "Transformers' causal class is of its decoder's config",
    "voxtral_realtime": "it does not run without sound",
}
RECORD = ROOT / "docs" / "families.json"


class NotApplicable(Exception):
    """Eager attention itself cannot do what the check asks for."""


@dataclass
class Outcome:
    """What came out of one type: `kind` `equal`, `refused`, `cannot be built` or `differs`;
    `checks`: `yes`, or what else."""

    kind: str
    reason: str = ""
    checks: dict[str, str] = field(default_factory=dict)


@dataclass
class Family:
    """A tiny model of a type, twice, with the same random weights: by eager attention and by
    `hip`."""

    eager: PreTrainedModel
    ours: PreTrainedModel

    def batch(self, lengths: list[int], right: bool = False) -> dict[str, torch.Tensor]:
        """Random prompts, padded on the left or right; those of an encoder-decoder are of both
        sides."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            at = slice(length) if right else slice(max(lengths) - length, None)
            ids[row, at] = torch.randint(4, VOCAB - 1, (length,), generator=generator)
            mask[row, at] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.decodes_apart:
            batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return batch

    @property
    def decodes_apart(self) -> bool:
        """Whether there is an encoder beside the decoder."""
        return bool(self.eager.config.is_encoder_decoder)

    def configure(self, **settings: Any) -> None:
        hip_hf.configure(self.ours, **{**SPARSE, **settings})

    def both(
        self, call: Callable[[PreTrainedModel], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `call` gives by `hip` and by eager attention."""
        try:
            want = call(self.eager)
        except Exception as error:
            raise NotApplicable(f"eager: {first_line(error)}") from error
        return call(self.ours), want

    def rows(self) -> list[Any]:
        return [
            row
            for row in hip_hf.explain(self.ours)
            if row.path != "not called" and row.reason != "attention is not causal"
        ]


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def names() -> list[tuple[str, str]]:
    """All types, with their kind."""
    return [
        *((kind, name) for kind in AUTO for name in types(kind)),
        *(("wrapper", name) for name in WRAPPERS),
    ]


def build(kind: str, name: str, implementation: str) -> PreTrainedModel:
    """A tiny model of the type, with the same random weights at every call; sharp enough attention
    for what is read to matter."""
    torch.manual_seed(0)
    if kind == "wrapper":
        model = WRAPPERS[name]({"text_config": implementation, "vision_config": "eager"}).eval()
    else:
        model = (
            AUTO[kind]
            .from_config(tiny_config(name, kind), attn_implementation=implementation)
            .eval()
        )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(SHARPER)
    model.generation_config.eos_token_id = -1  # never generated: every run has its full length
    return model


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
    """Where everything is read, logits are those of eager attention, through the sparse code where
    there is full attention."""
    family.configure(budget=COVERING)
    batch = family.batch(LENGTHS[:1])
    near(*family.both(lambda model: logits(model, batch)))
    rows = family.rows()
    assert rows, "no layer attends by hip"
    dense = {
        row.reason for row in rows if row.path == "dense" and "sliding window" not in row.reason
    }
    assert not dense, f"dense: {', '.join(sorted(dense))}"


def check_padding(family: Family) -> None:
    """The same in batches padded on the left and on the right."""
    family.configure(budget=COVERING)
    for right in (False, True):
        batch = family.batch(LENGTHS, right)
        real = batch["attention_mask"].bool()
        near(
            *family.both(lambda model, batch=batch, real=real: logits(model, batch)[real]),
            of="right: " if right else "left: ",
        )


def check_last_logits(family: Family) -> None:
    """`logits_to_keep=1` gives the last row of logits."""
    if "logits_to_keep" not in inspect.signature(family.eager.forward).parameters:
        raise NotApplicable("no logits_to_keep")
    family.configure(budget=COVERING)
    batch = family.batch(LENGTHS)
    near(*family.both(lambda model: logits(model, batch, logits_to_keep=1)))


def generated(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], **options: Any
) -> torch.Tensor:
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
    """A pruned run reads a part of the keys in every layer with full attention, and that changes
    the logits."""
    family.configure()
    batch = family.batch([300])
    got, want = family.both(lambda model: logits(model, batch))
    rows = [row for row in family.rows() if "sliding window" not in row.reason]
    if not rows:
        raise NotApplicable("all its layers slide")
    assert all(row.path == "sparse" and row.share < 0.8 for row in rows), (
        f"reads {[(row.share, row.reason) for row in rows]}"
    )
    assert float((got - want).abs().max() / want.abs().max()) > 10 * TOLERANCE, "nobody could tell"


def check_state(family: Family) -> None:
    """Decode keeps pyramids and selection: no step rereads all keys."""
    family.configure()
    generated(family.ours, family.batch(LENGTHS))
    rows = [row for row in family.rows() if "sliding window" not in row.reason]
    if not rows:
        raise NotApplicable("all its layers slide")
    kinds = {row.cache for row in rows} - {"pages", "kept state"}
    assert not kinds, f"read from {', '.join(sorted(kinds))}"


def check_chunks(family: Family) -> None:
    """A pruned prompt read in chunks gives the tokens of one read at once."""
    if family.decodes_apart:
        raise NotApplicable("encoder-decoder")
    family.configure()
    batch = family.batch(LENGTHS[:1])
    family.both(lambda model: generated(model, batch, prefill_chunk_size=CHUNK))
    whole, parts = (
        generated(family.ours, batch, prefill_chunk_size=size) for size in (None, CHUNK)
    )
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
    except Exception as error:
        return Outcome("cannot be built", CANNOT.get(name, first_line(error)))
    family = None
    try:
        family = Family(eager, build(kind, name, "hip"))
    except Exception as error:
        if is_refusal(error):
            return Outcome("refused", first_line(error))
        return Outcome("differs", first_line(error))
    family.ours.load_state_dict(eager.state_dict())
    batch = family.batch(LENGTHS[:1])
    try:
        logits(eager, batch)
    except Exception as error:
        return Outcome("cannot be built", CANNOT.get(name, first_line(error)))
    try:
        family.configure(budget=COVERING)
        logits(family.ours, batch)
    except Exception as error:
        return Outcome("refused" if is_refusal(error) else "differs", first_line(error))
    checks = {title: outcome(name, title, family) for title in CHECKS}
    return Outcome(
        "differs" if any(said.startswith("differs") for said in checks.values()) else "equal",
        "",
        checks,
    )


def outcome(name: str, title: str, family: Family) -> str:
    """`yes`, `-` with why the check says nothing of the type, `no` with a known reason, or
    `differs` with what is wrong."""
    limit = LIMITS.get((name, title))
    try:
        CHECKS[title](family)
    except NotApplicable as why:
        return f"- {why}"
    except Exception as error:
        return f"no: {limit}" if limit else f"differs: {first_line(error)}"
    return f"differs: it passes, but is listed as a limit: {limit}" if limit else "yes"


def is_refusal(error: Exception) -> bool:
    """Whether it is an error of this package about its use, with what was got and what is
    allowed."""
    return isinstance(error, ValueError) and " allowed: " in str(error)


def key(kind: str, name: str) -> str:
    """What a type is called in the record."""
    return name if kind == "causal" else f"{name} ({kind})"


def read_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def page(record: dict[str, Any]) -> str:
    """The table of the documentation, and below it the types that are refused or cannot be built,
    by their reasons."""
    found = {name: Outcome(**outcome) for name, outcome in record["types"].items()}
    kinds = Counter(outcome.kind for outcome in found.values())
    totals = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    versions = f"Transformers {record['transformers']}, PyTorch {record['torch']}"
    lines = [f"{versions}, {len(found)} types: {totals}.", ""]
    notes: dict[str, int] = {}
    lines += [f"| model type | {' | '.join(CHECKS)} |", "|---|" + "---|" * len(CHECKS)]
    for name, one in found.items():
        if one.checks:
            cells = [mark(said, notes) for said in one.checks.values()]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {why}" for why, number in notes.items())]
    for kind in kinds:
        reasons: dict[str, list[str]] = {}
        for name, one in found.items():
            if one.kind == kind and one.reason:
                # what differs between types of one reason is their name, and that of their layers
                reason = re.sub(
                    r"model type '\S+?'|\w+(?= passes)", "...", one.reason
                ).removeprefix("ValueError: ")
                reasons.setdefault(reason, []).append(f"`{name}`")
        if reasons:
            lines += [
                "",
                f"**Types: {kind}**",
                "",
                *(f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()),
            ]
    return "\n".join(lines) + "\n"


def mark(said: str, notes: dict[str, int]) -> str:
    """A cell: `yes`, or the number of the note that says why not, which is added to `notes`."""
    if said == "yes":
        return said
    answer, why = ("n/a", said[2:]) if said.startswith("-") else said.split(": ", 1)
    return f"{answer} ({notes.setdefault(why, len(notes) + 1)})"


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {key(*one): asdict(run(*one)) for one in names()}
    record = {
        "transformers": version("transformers"),
        "torch": version("torch").split("+")[0],
        "types": found,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
