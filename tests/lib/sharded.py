"""What models do, whole or with their heads shared out among processes: each process of `torchrun`
saves what it saw, for `test_tensor_parallel.py` to compare.

    torchrun --nproc-per-node 2 tests/lib/sharded.py FOLDER [--cut NAME] NAME ...

FOLDER holds a checkpoint of each name. What process R saw is written to `FOLDER/R.pt`; `--cut`:
what is said to a checkpoint whose heads cannot be shared out.
"""

from __future__ import annotations

import argparse
import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from continuous import batched
from families import SPARSE, make_batch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.distributed import DistributedConfig

import hip_hf
from hip_hf.attention import Result, attend
from hip_hf.integration import layer_attention
from hip_hf.integration.paged_layer import PagedLayer

LENGTHS = [203, 150, 117]
# Of each prompt, the last tokens whose logits are compared; what is selected is compared for all.
KEPT = 32
NEW = 8
HYPER = {"method": "hyper", "options": {"min_seq_len": 32, "block_size": 16, "sample_size": 16}}
QUESTIONS = ["The pass key of amber is 48213. Remember it.\n" * copies for copies in (12, 9)]


@contextmanager
def selections() -> Iterator[list[torch.Tensor]]:
    """The key blocks `[B, Hkv, query blocks, n]` that calls of the attention function select
    meanwhile."""
    seen: list[torch.Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Result:
        result = attend(*args, **kwargs, need_mask=True)
        if result.mask is not None:
            seen.append(result.mask.indices)
        return result

    layer_attention.attend = watched
    try:
        yield seen
    finally:
        layer_attention.attend = attend


def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[sequences, KEPT, vocabulary]`."""
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**batch, position_ids=positions, use_cache=False, logits_to_keep=KEPT).logits


def tokens(model: PreTrainedModel, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """Greedy ones."""
    return model.generate(**batch, do_sample=False, max_new_tokens=NEW, **kwargs)


def held(layer: CacheLayerMixin) -> int:
    """Bytes of a cache layer's keys and values."""
    if isinstance(layer, PagedLayer):
        return 0 if layer.pool is None else layer.pool.bytes(layer.pool.used)
    return layer.keys.nbytes + layer.values.nbytes


def observe(model: PreTrainedModel, folder: Path, rank: int) -> dict[str, Any]:
    """What must not depend on the number of processes, and the bytes of a cache, which must."""
    several = make_batch(LENGTHS)
    cache = hip_hf.HiPCache(model.config)
    seen: dict[str, Any] = {}
    with selections() as seen["selected"]:
        seen["logits"] = logits(model, several)
    seen["paths"] = [row.path for row in hip_hf.explain(model)]
    seen["share"] = [row.share for row in hip_hf.explain(model)]
    seen["tokens"] = tokens(model, several, past_key_values=cache)
    seen["bytes"] = sum(map(held, cache.layers))
    seen["batched"] = batched(
        model, [make_batch([n])["input_ids"][0].tolist() for n in LENGTHS], NEW
    )
    seen["static"] = tokens(model, several, cache_implementation="static")
    hip_hf.patch(model)
    seen["patched"], seen["patched_tokens"] = logits(model, several), tokens(model, several)
    hip_hf.configure(model, extend="streaming")
    seen["extended"], seen["extended_tokens"] = logits(model, several), tokens(model, several)
    hip_hf.unpatch(model)
    hip_hf.configure(model, **HYPER)
    seen["hyper"] = logits(model, several)
    hip_hf.configure(model, hip_hf.HiPConfig(**SPARSE))
    seen["resumed"], seen["refused"] = resumed(model, several, folder, rank)
    return seen


def resumed(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], folder: Path, rank: int
) -> tuple[torch.Tensor, str]:
    """Greedy tokens after a cache was saved and loaded, and what is said to a process that loads
    another's."""
    cache, (ids, mask) = hip_hf.HiPCache(model.config), batch.values()
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    cache.save(folder / f"{rank}.cache")
    other = hip_hf.HiPCache(model.config)
    other.load(folder / f"{rank}.cache")
    found = tokens(model, batch, past_key_values=other)
    if cache.shard is None:
        return found, ""
    torch.distributed.barrier()
    return found, said_to(
        lambda: other.load(folder / f"{(rank + 1) % torch.distributed.get_world_size()}.cache")
    )


def said_to(bad: Callable[[], Any]) -> str:
    """The error of what must not work."""
    try:
        bad()
    except ValueError as error:
        return str(error)
    return "nothing"


def evaluated(checkpoint: Path, **arguments: Any) -> dict[str, Any]:
    """What lm-eval's model says, by a prompt and by a score."""
    from lm_eval.api.instance import Instance

    from hip_hf.integration.lm_eval.model import HipLM

    lm = HipLM(str(checkpoint), device="cpu", **{**SPARSE, **arguments})
    until = {"until": ["."], "max_gen_toks": NEW, "do_sample": False}
    asked = [
        Instance("generate_until", {}, (text + "The pass key of amber is", until), 0)
        for text in QUESTIONS
    ]
    scored = [
        Instance("loglikelihood", {}, (text + "The pass key of amber is", " 48213"), 0)
        for text in QUESTIONS
    ]
    return {
        "answers": lm.generate_until(asked, disable_tqdm=True),
        "scores": torch.tensor([score for score, _ in lm.loglikelihood(scored, disable_tqdm=True)]),
        "evaluated_paths": lm.read.summary()["paths"],
    }


def shared_out(checkpoint: Path) -> PreTrainedModel:
    """A checkpoint with its heads shared out among the processes."""
    plan = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, distributed_config=plan, attn_implementation="hip"
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--cut")
    asked = parser.parse_args()
    atexit.register(note_group, asked.folder)  # the first to be registered is the last to be called
    seen: dict[str, Any] = {}
    for name in asked.names:
        model = shared_out(asked.folder / name)
        seen[name] = observe(model, asked.folder, torch.distributed.get_rank())
    if asked.cut:
        seen["cut"] = said_to(lambda: shared_out(asked.folder / asked.cut))
    rank = torch.distributed.get_rank()
    for name in asked.names:  # these models are to close the group as the process ends
        seen[name] |= evaluated(asked.folder / name, tp_plan="auto")
    torch.save(seen, asked.folder / f"{rank}.pt")


def note_group(folder: Path) -> None:
    """Write whether the processes still belong to a group."""
    (folder / "group").write_text("open" if torch.distributed.is_initialized() else "closed")


if __name__ == "__main__":
    main()
