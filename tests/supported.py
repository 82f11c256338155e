"""What is checked of every model type that the documentation lists as supported, and the page that lists them.

`python tests/supported.py FILE` runs the checks and writes the page; `test_supported.py` runs the same ones.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from families import _BASE, FAMILIES, SPARSE, make_batch, make_llava, make_qwen2_vl
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import hip_hf

# Model types besides those of `FAMILIES`, and what their configs need to be tiny.
MORE: dict[str, dict[str, Any]] = {
    "apertus": {}, "arcee": {}, "bitnet": {}, "cohere": {}, "cohere2": {"sliding_window": 24}, "deepseek_v3": dict(
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1, moe_intermediate_size=32,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        num_key_value_heads=4, head_dim=8,
    ), "ernie4_5": {}, "exaone4": {"sliding_window": 24}, "gemma": {}, "gemma3_text": {"sliding_window": 24}, "glm": {},
    "glm4": {}, "gpt_neox": {}, "gpt2": {"n_positions": 4096}, "granite": {}, "helium": {}, "hunyuan_v1_dense": {},
    "mixtral": {"num_local_experts": 4}, "nemotron": {}, "olmo": {}, "olmo2": {}, "olmo3": {"sliding_window": 24}, "phi": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, "seed_oss": {}, "smollm3": {},
    "stablelm": {}, "starcoder2": {},
}  # fmt: skip
# Wrappers of vision and language, here with text alone; `test_multimodal.py` shows them images.
WRAPPERS: dict[str, Callable[[Any], PreTrainedModel]] = {"llava": make_llava, "qwen2_vl": make_qwen2_vl}
# Each decode step is right, but O(T).
STATELESS = {"deepseek_v3": "its layers rebuild the keys after the cache, which loses the way to its state"}
# With attention of their own: they must be refused, not answered wrongly.
REFUSED = ["bloom", "mpt", "gptj"]
LENGTHS = [150, 133]
# Error of the logits that a sum in another order explains, fp32; they are of the order of 1.
TOLERANCE = 2e-3
# A multiple of the query block that leaves a last chunk of more rows than count as decode.
CHUNK = 64


def names() -> list[str]:
    """All model types that are checked."""
    return sorted([*FAMILIES, *MORE, *WRAPPERS])


def make(name: str, implementation: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of the type, with the same random weights at every call."""
    torch.manual_seed(0)
    if name in WRAPPERS:
        model = WRAPPERS[name]({"text_config": implementation, "vision_config": "eager"}).eval()
    else:
        config = FAMILIES[name] if name in FAMILIES else AutoConfig.for_model(name, **{**_BASE, **MORE.get(name, {})})
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    model.generation_config.eos_token_id = -1  # never generated: every run has its full length
    if implementation == "hip":
        hip_hf.configure(model, **{**SPARSE, **settings})
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the real tokens, `[tokens, vocab]`."""
    return model(**batch).logits[batch["attention_mask"].bool()].float()


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got - want).abs().max())
    assert error <= TOLERANCE, f"off by {error:.2g}"


def is_sliding(row: Any) -> bool:
    """Whether a row of `explain` is of a sliding layer, which is dense while its window is no longer than what is read."""
    return row.path == "dense" and row.reason.startswith("sliding window")


def check_prompt(name: str) -> None:
    """Where everything is read, logits are those of eager attention; through the sparse code."""
    batch, model = make_batch(LENGTHS[:1]), make(name, "hip", budget=512)
    near(logits(model, batch), logits(make(name, "eager"), batch))
    assert all(row.path == "sparse" or is_sliding(row) for row in hip_hf.explain(model))


def check_padding(name: str) -> None:
    """The same in a left-padded batch."""
    batch = make_batch(LENGTHS)
    near(logits(make(name, "hip", budget=512), batch), logits(make(name, "eager"), batch))


def check_decode(name: str) -> None:
    """Greedy tokens are those of eager attention."""
    batch, options = make_batch(LENGTHS), dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    ours, eager = make(name, "hip", budget=512), make(name, "eager")
    assert torch.equal(ours.generate(**batch, **options), eager.generate(**batch, **options))


def check_state(name: str) -> None:
    """Decode reads pages and keeps its selection: no step rereads all keys."""
    model = make(name, "hip")
    model.generate(**make_batch(LENGTHS), max_new_tokens=3, do_sample=False, pad_token_id=0)
    rows = [row for row in hip_hf.explain(model) if not is_sliding(row)]
    assert all(row.cache == "pages" for row in rows), STATELESS.get(name, f"read from {', '.join({row.cache for row in rows})}")


def check_chunks(name: str) -> None:
    """A pruned prompt read in chunks gives the tokens of one read at once."""
    batch = make_batch(LENGTHS[:1])
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    whole, parts = (make(name, "hip").generate(**batch, **options, prefill_chunk_size=size) for size in (None, CHUNK))
    assert torch.equal(whole, parts)


def check_gradients(name: str) -> None:
    """A training step gives the gradients of eager attention where everything is read."""
    batch = make_batch(LENGTHS[:1])
    found = []
    for implementation in ("hip", "eager"):
        model = make(name, implementation, budget=512)
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    near(*found)


CHECKS: dict[str, Callable[[str], None]] = {
    "prompt": check_prompt,
    "left padding": check_padding,
    "decode": check_decode,
    "kept state": check_state,
    "chunked prefill": check_chunks,
    "gradients": check_gradients,
}


def check_refused(name: str) -> str:
    """The error that a model with attention of its own gives; raises AssertionError if there is none."""
    try:
        logits(make(name, "hip"), make_batch(LENGTHS[:1]))
    except (ValueError, KeyError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    raise AssertionError(f"{name} was not refused")


def outcome(check: Callable[[str], None], name: str) -> str:
    try:
        check(name)
    except Exception as error:  # whatever it is, it belongs on the page
        said = str(error).strip() or type(error).__name__
        return f"no: {said.splitlines()[0].replace('|', '/')}"
    return "yes"


def page() -> str:
    """The page, from the outcome of every check."""
    lines = [
        f"Transformers {version('transformers')}, PyTorch {version('torch')}, a tiny random model of each type on the CPU, fp32:",
        "",
        f"| model type | {' | '.join(CHECKS)} |",
        "|---|" + "---|" * len(CHECKS),
    ]
    for name in names():
        lines.append(f"| `{name}` | {' | '.join(outcome(check, name) for check in CHECKS.values())} |")
    lines += ["", f"Refused, with an error: {', '.join(f'`{name}`' for name in REFUSED if check_refused(name))}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
