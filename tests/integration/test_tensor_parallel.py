"""A model whose heads are shared out among processes (`tp_plan="auto"` under torchrun) does what it
does in one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from families import PATCHED, SPARSE, VOCAB, make_model
from pretrained import fetched
from processes import launch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.distributed import DistributedConfig

import hip_hf

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}  # for two or four processes
# A sliding window is longer than what is read: layers with one are sparse as well.
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {},
    "mistral": {"sliding_window": 120},
}
REAL, CUT = "real", "cut"  # folders
REAL_LAYERS = 2
TOLERANCE = 1e-5
# What is compared within the tolerance; all else is equal.
NEAR = ("logits", "patched", "extended", "hyper", "scores")


def save_tiny(folder: Path) -> None:
    """A checkpoint of each family, whose tokenizer knows the words of lm-eval's questions; and one
    with three key heads."""
    words = dict.fromkeys(
        ["<pad>", "<s>", "<unk>", *" ".join([*sharded.QUESTIONS, "48213"]).split()]
    )
    vocabulary = [*words, *(f"w{i}" for i in range(VOCAB - 1 - len(words))), "</s>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", unk_token="<unk>", eos_token="</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    with pytest.MonkeyPatch.context() as patch:
        for name, fields in TINY.items():
            config = copy.deepcopy(PATCHED[name])
            for field, value in {**HEADS, **fields}.items():
                setattr(config, field, value)
            patch.setitem(PATCHED, name, config)
            model = make_model(name)
            model.generation_config.eos_token_id = None
            model.save_pretrained(folder / name)
            fast.save_pretrained(folder / name)
    AutoModelForCausalLM.from_config(cut(3, 1)).save_pretrained(folder / CUT)


def save_real(folder: Path) -> None:
    """Of SmolLM2 the first layers, in float64: its logits are too large for single precision to
    agree in 1e-5."""
    model, real = fetched(), folder / REAL
    real.mkdir()
    for file in model.iterdir():
        (real / file.name).symlink_to(file)
    config = json.loads((real / "config.json").read_text())
    (real / "config.json").unlink()
    config |= {
        "num_hidden_layers": REAL_LAYERS,
        "dtype": "float64",
        "hip": hip_hf.HiPConfig(**SPARSE).to_dict(),
    }
    (real / "config.json").write_text(json.dumps(config))


def keeps(what: str, whole: Any, parts: list[Any]) -> bool:
    """Whether each of the processes has what one process has: a cache its part of the bytes, and
    the heads of all together are one's. (Query heads vote for their group alone, and a group is in
    one process.)"""
    count = len(parts)
    if what == "bytes":
        return all(part * count == whole for part in parts)
    if what == "selected":
        layers = zip(*parts, strict=True)
        return all(
            torch.equal(torch.cat(layer, 1), expected)
            for layer, expected in zip(layers, whole, strict=True)
        )
    if what == "refused":  # a saved cache is not taken for that of other heads
        said = [
            (f'"shard": [{(rank + 1) % count}, {count}]', f'"shard": [{rank}, {count}]')
            for rank in range(count)
        ]
        halves = [part.split("allowed") for part in parts]
        return all(
            got in half[0] and allowed in half[1]
            for half, (got, allowed) in zip(halves, said, strict=True)
        )
    if what in NEAR:
        return all(torch.allclose(part, whole, atol=TOLERANCE, rtol=0) for part in parts)
    if what == "share":
        return all(part == pytest.approx(whole) for part in parts)
    if isinstance(whole, torch.Tensor):
        return all(torch.equal(part, whole) for part in parts)
    return all(part == whole for part in parts)


# By the number of processes: what is saved, the models, and options. The real model has three key
# heads. Of four processes one family says it: what differs among families is told by two.
RUNS: dict[int, tuple[Callable[[Path], None], list[str], list[str]]] = {
    2: (save_tiny, list(TINY), ["--cut", CUT]),
    3: (save_real, [REAL], []),
    4: (save_tiny, ["llama"], ["--cut", CUT]),
}


@pytest.mark.parametrize("processes", RUNS)
def test_several_processes_do_what_one_does(processes: int, tmp_path: Path) -> None:
    """Logits and greedy tokens: of left-padded prompts, through a cache in pages, a static one and
    one that was saved, in continuous batching, patched, extended, by a method that draws, in
    lm-eval."""
    save, names, options = RUNS[processes]
    save(tmp_path)
    launch(processes, sharded.__file__, tmp_path, *names, *options)
    several = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    broken = []
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, attn_implementation="hip"
        ).eval()
        one = sharded.observe(model, tmp_path, 0)
        assert set(one["paths"]) == {"sparse"}
        assert max(one["share"]) < 0.9
        one |= sharded.evaluated(tmp_path / name)
        assert list(one["evaluated_paths"]["prefill"]) == ["sparse"]
        # within a sliding window nothing needs to be extended
        for what in (
            "hyper",
            *(() if getattr(model.config, "sliding_window", None) else ("extended",)),
        ):
            assert not torch.allclose(one[what], one["logits"], atol=1e-2), what
        broken += [
            (name, what)
            for what in one
            if not keeps(what, one[what], [seen[name][what] for seen in several])
        ]
    assert broken == []
    if CUT in several[0]:
        assert {seen[CUT].partition(" (")[0] for seen in several} == {
            f"tp_size: got {processes} processes for the 3 key heads of LlamaModel, allowed: 1 | 3"
        }
    assert (tmp_path / "group").read_text() == "closed"


def cut(heads: int, processes: int) -> LlamaConfig:
    """As `from_pretrained` makes it for `processes` processes."""
    sizes = dict(
        num_attention_heads=3 * heads,
        num_key_value_heads=heads,
        hidden_size=48 * heads,
        intermediate_size=32,
    )
    config = LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    config.distributed_config = DistributedConfig(tp_size=processes)
    return config


@pytest.mark.parametrize(
    ("heads", "processes", "allowed"), [(3, 2, r"1 \| 3"), (6, 4, r"1 \| 2 \| 3 \| 6"), (1, 2, "1")]
)
def test_processes_that_do_not_divide_the_key_heads_are_refused(
    heads: int, processes: int, allowed: str
) -> None:
    said = rf"tp_size: got {processes} processes for the {heads} key heads of Llama\w+, "
    said += rf"allowed: {allowed} \("
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_config(cut(heads, processes), attn_implementation="hip")
    model = AutoModelForCausalLM.from_config(cut(heads, processes), attn_implementation="sdpa")
    with pytest.raises(ValueError, match=said):
        model.set_attn_implementation("hip")
    assert model.config._attn_implementation == "sdpa"


def test_processes_that_divide_the_key_heads_are_taken() -> None:
    for processes in (1, 2, 3, 6):
        AutoModelForCausalLM.from_config(cut(6, processes), attn_implementation="hip")
