"""`hip-hf memory`: the rows it measures, and what it makes of them."""

from __future__ import annotations

import json
import pickle
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import BIG, GROUPED, invoke, refused
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    PreTrainedConfig,
)

from hip_hf.cli import memory as memory_command
from hip_hf.eval.measure import memory
from hip_hf.eval.measure.documents import CHECKPOINT

COLUMNS = {"cache", "length", "bytes_per_token", "resident_MiB", "peak_MiB", "device_MiB"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of its own for each row: what is measured then includes the tests' memory, but all
    of it is real. Arguments are sent as to a process."""
    pool = SimpleNamespace(
        apply=lambda function, arguments: function(*pickle.loads(pickle.dumps(arguments)))
    )
    context = SimpleNamespace(Pool=lambda size: nullcontext(pool))
    monkeypatch.setattr(
        memory, "multiprocessing", SimpleNamespace(get_context=lambda kind: context)
    )


def test_rows_table_json_and_plot(tmp_path: Path) -> None:
    """At a length that is no multiple of a page, or of a chunk, and where an eighth of it is less
    than a step needs."""
    plot, output = tmp_path / "memory.png", tmp_path / "memory.json"
    given = ("--lengths", 5000, "--plot", plot, "--output", output)
    done = invoke(memory_command.main, *given)
    assert done.exit_code == 0, done.output
    rows = json.loads(output.read_text())["rows"]
    assert [row["cache"] for row in rows] == list(memory.CACHE_KINDS)
    assert all(set(row) == COLUMNS and row["length"] == 5000 for row in rows)
    for kind in memory.CACHE_KINDS:
        assert kind in done.output
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_offloaded_cache_has_its_pools_and_summaries_on_the_device() -> None:
    pages, heads, dim, layers = (
        16,
        2,
        64,
        4,
    )  # an eighth of 128 pages, and as many blocks as a step selects
    found = (
        memory.cache_row("hip offloaded", memory.read_config(str(CHECKPOINT)), 8192)["device_MiB"]
        * 2**20
    )
    pools = 3 * layers * heads * pages * 64 * dim * 4  # keys, values, searched keys; fp32
    blocks = (8192 - 512) // 16  # up to the window
    summaries = (
        sum(blocks >> level for level in range(blocks.bit_length())) * layers * heads * 2 * dim * 4
    )
    assert pools + summaries <= found <= pools + 2 * summaries  # tables may have room to grow


# Key heads and their size; of configs that name neither, or one of them, or that hold one of a
# language part.
SHAPES: dict[str, tuple[PreTrainedConfig, int, int]] = {
    "llama": (AutoConfig.for_model("llama", **GROUPED, head_dim=32), 2, 32),
    "qwen2": (AutoConfig.for_model("qwen2", **GROUPED), 2, 16),
    "phi3": (AutoConfig.for_model("phi3", **GROUPED), 2, 16),
    "gpt2": (AutoConfig.for_model("gpt2", n_embd=48, n_head=3, n_layer=2), 3, 16),
    "gpt_neox": (AutoConfig.for_model("gpt_neox", **BIG), 4, 16),
    "gpt_oss": (
        AutoConfig.for_model("gpt_oss", **GROUPED, head_dim=32, num_local_experts=4),
        2,
        32,
    ),
    "mixtral": (AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4), 2, 16),
    "llava": (LlavaConfig(text_config=AutoConfig.for_model("qwen2", **GROUPED)), 2, 16),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_families(name: str, tmp_path: Path) -> None:
    config, heads, dim = SHAPES[name]
    config.save_pretrained(tmp_path)
    net = AutoModelForCausalLM.from_config(memory.read_config(str(tmp_path)))
    assert memory.shapes_of(net) == [((1, heads, 1, dim),) * 2] * 2
    assert (
        sum(p.numel() for p in net.parameters()) < 200_000
    )  # with vocabulary and feed-forward layers some millions


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llava"])
def test_command_on_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, heads, dim = SHAPES[name]
    config.save_pretrained(tmp_path)
    held = []
    monkeypatch.setattr(memory, "_device_bytes", lambda cache, resident: held.append(cache) or 0)
    done = invoke(memory_command.main, str(tmp_path), "--lengths", "2500", "--json")
    assert done.exit_code == 0, done.output
    assert [row["cache"] for row in json.loads(done.stdout)["rows"]] == list(memory.CACHE_KINDS)
    for cache in held:
        assert cache.get_seq_length() == 2500 + memory.STEPS
        assert [(layer.keys.shape[1], layer.values.shape[3]) for layer in cache.layers] == [
            (heads, dim)
        ] * 2


def test_what_it_cannot_build_is_refused(tmp_path: Path) -> None:
    assert "cannot load" in refused(memory_command.main, str(tmp_path))
    CLIPVisionConfig().save_pretrained(tmp_path)
    assert "cannot load" in refused(memory_command.main, str(tmp_path))


def test_layers_without_keys_are_refused() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64)
    with torch.inference_mode(), pytest.raises(ValueError, match="keep keys and values"):
        memory.shapes_of(AutoModelForCausalLM.from_config(config))


def test_bad_lengths_are_refused() -> None:
    assert invoke(memory_command.main, "--lengths", "many").exit_code != 0
