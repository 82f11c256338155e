"""A conversation about one document. It is read once, and each turn computes its new tokens
only."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer

from hip_hf.eval.measure import generate
from hip_hf.eval.measure.memory import cache_mib
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.integration.settings import read_settings, text_config

# For models without a chat template: a line for each turn, so an answer ends with its line.
PLAIN = (
    "{% for message in messages %}{{ 'User: ' if message['role'] == 'user' else 'Assistant:' }}"
    "{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
END_OF_LINE = "\n"
# Two first questions that have no character in common: what stays is the document.
PROBES = ("A", "?")
# Elements of each tensor that stand for all of them: training changes nearly every one.
WEIGHTS_LOOKED_AT = 16


class Interrupt(StoppingCriteria):
    """While it is entered, Ctrl-C ends the answer after the token that is being computed, so that
    every layer's cache holds the same tokens. A second Ctrl-C is an ordinary one."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), self.asked, device=ids.device)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __enter__(self) -> Interrupt:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *args: Any) -> None:
        signal.signal(signal.SIGINT, self.before)


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and what that took."""

    question: str
    answer: str
    interrupted: bool
    # of the question and what the template puts around it; more where the template rewrites
    tokens_read: int
    tokens_new: int
    seconds: float  # from the question to the answer's end
    first_token_s: float
    tokens_per_s: float | None  # of decoding; None for a single token
    # density of the last forward pass, mean of the layers
    keys_read: float | None
    cache_tokens: int
    cache_mib: float

    def __str__(self) -> str:
        """The line that is shown below an answer."""
        speed = "" if self.tokens_per_s is None else f" at {self.tokens_per_s:.1f} a second"
        keys = "" if self.keys_read is None else f", {self.keys_read:.0%} of the keys read"
        took = f"{self.seconds:.2f} s{' (interrupted)' if self.interrupted else ''}"
        read = f"{self.tokens_read:,} tokens read in {self.first_token_s:.2f} s"
        cache = f"cache: {self.cache_tokens:,} tokens, {self.cache_mib:,.0f} MiB"
        return f"{took}: {read}, {self.tokens_new:,} new ones{speed}{keys}; {cache}"


def shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    apart = (i for i, (one, other) in pairs if one != other)
    return next(apart, min(len(first), len(second)))


class Conversation:
    """A document, what was asked and answered, and the cache that holds it.

    The model's template renders the whole conversation anew at every turn. The cache keeps the
    tokens that this rendering begins with, which are all it holds unless the template rewrites
    earlier turns (some drop a model's thoughts, or spaces), or unless an answer's text is not spelt
    with the tokens that were generated.

    Attributes:
        cache: the `HiPCache`.
        held: the ids of exactly those tokens whose keys and values are in it.
        document_ids: what every conversation about this document begins with.
    """

    def __init__(self, model: Any, tokenizer: Any, document: str, chunk: int | None = None) -> None:
        self.model, self.tokenizer, self.document, self.chunk = model, tokenizer, document, chunk
        self.plain = tokenizer.chat_template is None
        self.cache, self.held = HiPCache(model.config), list[int]()
        self.messages: list[dict[str, str]] = []
        asked = [self.render([self._question(probe)]) for probe in PROBES]
        ids = self.encode(asked[0][: shared(*asked)])
        # before a question the last token may be another
        self.document_ids = ids[: shared(ids, self.encode(asked[0]))]

    def _question(self, question: str) -> dict[str, str]:
        """The user's next message. The first holds the document: not every template has a place for
        a system's."""
        content = question if self.messages else f"{self.document}\n\n{question}"
        return {"role": "user", "content": content}

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation, up to where the next answer begins."""
        options = dict(chat_template=PLAIN if self.plain else None, tokenize=False)
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)

    def encode(self, text: str) -> list[int]:
        """The tokens of a rendered text."""
        special = self.plain  # a model's template has its own
        return self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    def read_document(self, read: Callable[[int], None] = lambda rows: None) -> None:
        """Fill the cache with the document; `read` is told how many tokens each forward pass has
        read."""
        generate.generate(self.model, self.document_ids, 1, self.chunk, read, self.cache)
        self.held = list(self.document_ids)

    def made_of(self) -> dict[str, Any]:
        """What the document's cache is computed from."""
        ids, weights = torch.tensor(self.document_ids), hashlib.sha256()
        for name, weight in self.model.named_parameters():
            some = weight.detach().flatten()[:WEIGHTS_LOOKED_AT].cpu()
            weights.update(f"{name} {weight.dtype} {tuple(weight.shape)} {some.tolist()}".encode())
        settings = read_settings(text_config(self.model)).to_dict()
        document = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        made = {"document": document, "weights": weights.hexdigest(), "chunk": self.chunk}
        return made | settings

    def save_document(self, path: Path) -> None:
        """Write the cache, which holds the document and no question yet, to a file. Raises as
        `HiPCache.save` does."""
        self.cache.save(path, made_of=self.made_of())

    def load_document(self, path: Path) -> None:
        """Fill the cache from a file that `save_document` wrote. Raises ValueError if it is another
        document's, another model's, or was made with other settings, and FileNotFoundError if
        there is no file."""
        self.cache.load(path, device=self.model.device, made_of=self.made_of())
        self.held = list(self.document_ids)

    def ask(
        self, question: str, max_new_tokens: int, text: TextStreamer | None = None, **options: Any
    ) -> Turn:
        """Answer a question, in at most `max_new_tokens` tokens, greedily unless Transformers'
        `options` say otherwise. Ctrl-C ends the answer; what there is of it then belongs to the
        conversation. `text` gets the tokens as they come."""
        start = time.perf_counter()
        messages = [*self.messages, self._question(question)]
        prompt = self.encode(self.render(messages))
        # something must be read, to be answered
        self._keep(min(shared(self.held, prompt), len(prompt) - 1))
        before = len(self.held)
        if self.plain:
            options = {**options, "stop_strings": END_OF_LINE, "tokenizer": self.tokenizer}
        try:
            with Interrupt() as interrupt:
                options |= dict(stopping_criteria=[interrupt], cache=self.cache, text=text)
                given = prompt, max_new_tokens, self.chunk
                result = generate.generate(self.model, *given, **options)
        except BaseException:
            # or the first of them; which tokens the answer had is not known
            self.held = list(prompt)
            self._keep(min(self.cache.get_seq_length(), len(prompt)))
            raise
        self.held = (prompt + result.ids)[: self.cache.get_seq_length()]
        answer = self.tokenizer.decode(result.ids, skip_special_tokens=True)
        answer = answer.partition(END_OF_LINE)[0] if self.plain else answer
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        layers = result.prefill if result.tokens_per_s is None else result.decode
        densities = [layer.share for layer in layers if layer.share is not None]
        return Turn(
            question,
            answer.strip(),
            interrupt.asked,
            tokens_read=len(prompt) - before,
            tokens_new=len(result.ids),
            seconds=time.perf_counter() - start,
            first_token_s=result.first_token_s,
            tokens_per_s=result.tokens_per_s,
            keys_read=fmean(densities) if densities else None,
            cache_tokens=len(self.held),
            cache_mib=cache_mib(self.cache),
        )

    def _keep(self, length: int) -> None:
        """Crop the cache to its first `length` tokens; to none where a layer cannot go back so far
        (a sliding window that has moved on, a running state), and then everything is read again."""
        there = self.cache.get_seq_length()
        try:
            if length < there:
                self.cache.crop(length - there)
        except RuntimeError:
            self.cache, length = HiPCache(self.model.config), 0
        del self.held[length:]
