"""A tiny checkpoint with the demo's tokenizer, as fixtures, and commands run on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from train import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hip_hf import configure

SETTINGS = dict(
    budget=64, window=32, sink=16, block_q=32, dense_layers=1, dense_below=0, dense_tail=32
)
LENGTH = 1024
SENTENCE = (
    "It is a truth universally acknowledged that whoever keeps a long text in mind "
    "must forget some part of it ."
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document: words in an order that does not repeat soon."""
    file = tmp_path_factory.mktemp("text") / "document.txt"
    words = SENTENCE.split()
    file.write_text(
        " ".join(
            words[i * i % 89 % len(words)] + " " + words[i * 7 % 23 % len(words)]
            for i in range(4000)
        )
    )
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    """A Llama of two layers, of which the first is dense, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tokenizer([text])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=LENGTH,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    configure(model, **SETTINGS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(command: Any, *arguments: object) -> Any:
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(command: Any, *arguments: object) -> dict[str, Any]:
    result = run(command, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
