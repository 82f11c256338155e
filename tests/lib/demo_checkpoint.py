"""A tiny checkpoint with the demo's tokenizer, and its document, as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import TINY
from train import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hip_hf import configure

SETTINGS = dict(
    budget=64, window=32, sink=16, block_q=32, dense_layers=1, dense_below=0, dense_tail=32
)
LENGTH = TINY["max_position_embeddings"]
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
    own = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **own, "bos_token_id": 1, "eos_token_id": 2}))
    configure(model, **SETTINGS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
