"""Measuring commands on a tiny checkpoint: their JSON, or what they say when they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

TEXT = "It is a truth universally acknowledged, that a text must be filled with words. " * 40
SMALL = {"budget": 32, "block_q": 16, "block_k": 8, "sink": 8, "window": 16}
# The config of a tiny model whose tokens are bytes.
TINY: dict[str, Any] = dict(
    vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte: a digit is a token, and so is the space before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(["<pad>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=512
    )


def save_checkpoint(folder: Path) -> tuple[str, str]:
    """A tiny random Llama with a byte tokenizer, and a document: the arguments that name them."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return str(folder), str(folder / "text.txt")


def invoke(command: Any, *arguments: object, **environment: str) -> Result:
    """Run the function of a command as `hip-hf` would."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments])


def run(command: Any, *arguments: object) -> Any:
    """The JSON that a command prints."""
    result = invoke(command, *arguments, "--json")
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)


def refused(command: Any, *arguments: object) -> str:
    """What a command says to arguments that it must refuse."""
    result = invoke(command, *arguments, COLUMNS="400", TERM="dumb")
    assert result.exit_code == 2, result.output
    return result.stderr


# Configs with a large vocabulary, and with fewer key heads than query heads.
BIG = {
    "vocab_size": 50000,
    "intermediate_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**BIG, "num_key_value_heads": 2, "pad_token_id": 40000}
