"""A model whose heads are shared out among processes (`tp_plan="auto"` under torchrun) does what it does in one."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from families import PATCHED, SPARSE, make_model
from processes import launch
from test_real_model import fetched
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

import hip_hf

# For up to four processes. A sliding window is longer than what is read: layers with one are sparse as well.
HEADS: dict[str, dict[str, Any]] = {
    name: {"num_attention_heads": 8, "num_key_value_heads": 4} for name in ("llama", "qwen3", "qwen3_moe", "mistral")
}
HEADS["mistral"]["sliding_window"] = 120
THOROUGH = ("llama", "qwen3_moe")
TOLERANCE = 1e-5

Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family."""
    where = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        for name, fields in HEADS.items():
            config = copy.deepcopy(PATCHED[name])
            for field, value in fields.items():
                setattr(config, field, value)
            patch.setitem(PATCHED, name, config)
            patch.setitem(sys.modules["families"].FAMILIES, name, config)
            model = make_model(name)
            model.generation_config.eos_token_id = None
            model.save_pretrained(where / name)
    return where


@pytest.fixture(scope="module")
def one(folder: Path) -> Seen:
    """What each model does in this process alone."""
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="hip").eval() for name in HEADS}
    return {name: sharded.observe(model, name in THOROUGH, folder, 0) for name, model in models.items()}


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Seen]:
    """What each of two processes saw, which lm-eval's model was the last to use."""
    quick = [name for name in HEADS if name not in THOROUGH]
    launch(2, sharded.__file__, folder, "--lm-eval", "--quick", *quick, "--thorough", *THOROUGH)
    assert (folder / "group").read_text() == "closed"
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def four(folder: Path) -> list[Seen]:
    launch(4, sharded.__file__, folder, "--quick", *HEADS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.fixture(params=[2, 4])
def several(request: pytest.FixtureRequest) -> list[Seen]:
    found: list[Seen] = request.getfixturevalue({2: "two", 4: "four"}[request.param])
    return found


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_each_process_gives_the_logits_and_tokens_of_one(name: str, one: Seen, several: list[Seen]) -> None:
    expected = one[name]
    assert set(expected["paths"]) == {"sparse"}
    assert max(expected["share"]) < 0.9
    for seen in several:
        near(seen[name]["logits"], expected["logits"])
        assert torch.equal(seen[name]["tokens"], expected["tokens"])
        assert seen[name]["paths"] == expected["paths"]
        assert seen[name]["share"] == pytest.approx(expected["share"])


@pytest.mark.parametrize("name", HEADS)
def test_each_key_head_selects_what_it_selects_in_one_process(name: str, one: Seen, several: list[Seen]) -> None:
    """Query heads vote for their group alone, and a group is in one process."""
    parts = zip(*(seen[name]["selected"] for seen in several), strict=True)
    for layer, expected in zip(parts, one[name]["selected"], strict=True):
        assert torch.equal(torch.cat(layer, 1), expected)


@pytest.mark.parametrize("name", HEADS)
def test_the_bytes_of_a_cache_are_shared_out(name: str, one: Seen, several: list[Seen]) -> None:
    assert [seen[name]["bytes"] * len(several) for seen in several] == [one[name]["bytes"]] * len(several)


@pytest.mark.parametrize("what", ["patched", "extended", "hyper"])
@pytest.mark.parametrize("name", THOROUGH)
def test_other_ways_give_the_logits_of_one(name: str, what: str, one: Seen, two: list[Seen]) -> None:
    for seen in two:
        near(seen[name][what], one[name][what])
    if what != "patched":
        assert not torch.allclose(one[name][what], one[name]["logits"], atol=1e-2)


@pytest.mark.parametrize("what", ["batched", "static", "patched_tokens", "extended_tokens", "resumed"])
@pytest.mark.parametrize("name", THOROUGH)
def test_other_ways_give_the_tokens_of_one(name: str, what: str, one: Seen, two: list[Seen]) -> None:
    expected = torch.as_tensor(one[name][what])
    for seen in two:
        assert torch.equal(torch.as_tensor(seen[name][what]), expected)


@pytest.mark.parametrize("name", THOROUGH)
def test_a_saved_cache_is_not_taken_for_that_of_other_heads(name: str, two: list[Seen]) -> None:
    for rank, seen in enumerate(two):
        assert f'"shard": [{1 - rank}, 2]' in seen[name]["refused"].split("allowed")[0]
        assert f'"shard": [{rank}, 2]' in seen[name]["refused"].split("allowed")[1]


def test_lm_eval_scores_as_in_one_process(two: list[Seen]) -> None:
    expected = sharded.evaluated()
    assert list(expected["read"]["paths"]["prefill"]) == ["sparse"]
    for seen in two:
        near(seen["lm_eval"]["scores"], expected["scores"])
        assert seen["lm_eval"]["answers"] == expected["answers"]
        assert seen["lm_eval"]["read"]["paths"] == expected["read"]["paths"]


def cut(heads: int, processes: int) -> LlamaConfig:
    """As `from_pretrained` makes it for so many processes."""
    sizes = dict(num_attention_heads=3 * heads, num_key_value_heads=heads, hidden_size=48 * heads, intermediate_size=32)
    config = LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    config.distributed_config = DistributedConfig(tp_size=processes)
    return config


@pytest.mark.parametrize(("heads", "processes", "allowed"), [(3, 2, r"1 \| 3"), (6, 4, r"1 \| 2 \| 3 \| 6"), (1, 2, "1")])
def test_processes_that_do_not_divide_the_key_heads_are_refused(heads: int, processes: int, allowed: str) -> None:
    said = rf"tp_size: got {processes} processes for the {heads} key heads of Llama\w+, allowed: {allowed} \("
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_config(cut(heads, processes), attn_implementation="hip")
    model = AutoModelForCausalLM.from_config(cut(heads, processes), attn_implementation="sdpa")
    with pytest.raises(ValueError, match=said):
        model.set_attn_implementation("hip")
    assert model.config._attn_implementation == "sdpa"


def test_processes_that_divide_the_key_heads_are_taken() -> None:
    for processes in (1, 2, 3, 6):
        AutoModelForCausalLM.from_config(cut(6, processes), attn_implementation="hip")


def test_a_real_model_in_as_many_processes_as_it_has_key_heads(tmp_path: Path) -> None:
    """Of SmolLM2 the first layers, in float64: its logits are too large for single precision to agree in 1e-5."""
    model, real = fetched(tmp_path / "fetched"), tmp_path / "real"
    real.mkdir()
    for file in model.iterdir():
        (real / file.name).symlink_to(file)
    config = json.loads((real / "config.json").read_text())
    (real / "config.json").unlink()
    config |= {"num_hidden_layers": 4, "dtype": "float64", "hip": hip_hf.HiPConfig(**SPARSE).to_dict()}
    (real / "config.json").write_text(json.dumps(config))
    launch(config["num_key_value_heads"], sharded.__file__, tmp_path, "--quick", "real")
    several = [torch.load(tmp_path / f"{rank}.pt") for rank in range(config["num_key_value_heads"])]
    whole = AutoModelForCausalLM.from_pretrained(real, attn_implementation="hip").eval()
    one = {"real": sharded.observe(whole, False, tmp_path, 0)}
    test_each_process_gives_the_logits_and_tokens_of_one("real", one, several)
    test_each_key_head_selects_what_it_selects_in_one_process("real", one, several)
    test_the_bytes_of_a_cache_are_shared_out("real", one, several)
