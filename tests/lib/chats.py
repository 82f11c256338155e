"""Conversations of a tiny model that says words only, with a tokenizer of the same words."""

from __future__ import annotations

from typing import Any

from families import VOCAB, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hip_hf.eval.measure.chat import Conversation

# A turn is `<s> user ... </s>` or `<s> assistant ... </s>`, a token a word.
TEMPLATE = (
    "{% for message in messages %}"
    "<s> {{ message['role'] }} {{ message['content'] }} </s> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
SPECIAL = ["<pad>", "<s>", "<unk>", "user", "assistant"]
WORDS = [*SPECIAL, *(f"w{i:02}" for i in range(len(SPECIAL), VOCAB - 1)), "</s>"]
DOCUMENT = " ".join(WORDS[5 + i * i % 89] for i in range(150))
QUESTIONS = tuple(
    " ".join(WORDS[first : first + count]) for first, count in ((10, 16), (30, 18), (50, 14))
)
NEW = 6


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made


def word_model(family: str = "llama", **settings: Any) -> PreTrainedModel:
    """A model that says words only."""
    model = make_model(family, **settings)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [
        i for i, word in enumerate(WORDS) if not word.startswith("w")
    ]
    return model


def talk(model: PreTrainedModel, tokenizer: Any = None, document: str = DOCUMENT) -> Conversation:
    """A conversation that has read its document, in two chunks."""
    one = Conversation(model, tokenizer or word_tokenizer(), document, chunk=100)
    one.read_document()
    return one
