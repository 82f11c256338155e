"""`hip-hf chat`: turns that compute their new tokens only, and answer what the whole conversation
read anew would answer."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from chats import DOCUMENT, NEW, QUESTIONS, TEMPLATE, talk, word_model, word_tokenizer
from commands import byte_tokenizer
from transformers import PreTrainedModel, TextStreamer

from hip_hf import explain
from hip_hf.cli import chat
from hip_hf.eval.measure import generate
from hip_hf.eval.measure.chat import Conversation

# Answers begin with another word once they are history.
REWRITTEN = TEMPLATE.replace(
    "message['content']",
    "(message['content'] if message['role'] == 'user' else 'w05' + message['content'][3:])",
)
ALL_READ = dict(
    budget=1024
)  # what is selected, when, and for how many rows then makes no difference


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each forward pass computes."""
    rows: list[int] = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    yield rows
    hook.remove()


def afresh(one: Conversation, question: str) -> tuple[list[int], str]:
    """The tokens of the conversation with this question, and the answer of a model that has to read
    all of them."""
    prompt = one.encode(one.render([*one.messages, one._question(question)]))
    new = generate.generate(one.model, prompt, NEW).ids
    return prompt, one.tokenizer.decode(new, skip_special_tokens=True).strip()


def check_held(one: Conversation, prompt: list[int]) -> None:
    """The cache holds the prompt and the answer but for its last token, in every layer."""
    assert {layer.get_seq_length() for layer in one.cache.layers} == {len(one.held)}
    assert one.held[: len(prompt)] == prompt
    assert len(one.held) == len(prompt) + NEW - 1


def test_a_turn_computes_its_new_tokens_only() -> None:
    model = word_model()
    with counted(model) as rows:
        one = talk(model)
    length = len(f"<s> user {DOCUMENT}".split())
    assert rows == [100, length - 100]
    assert len(one.held) == one.cache.get_seq_length() == length
    for number, question in enumerate(QUESTIONS):
        with counted(model) as rows:
            turn = one.ask(question, NEW)
        new = len(f"{question} </s> <s> assistant".split())
        if number:  # the last token of the answer before was said, not read
            new += 1 + len(["</s>", "<s>", "user"])
        assert rows == [new] + [1] * (NEW - 1)
        assert (turn.tokens_read, turn.tokens_new) == (new, NEW)
        length += new + NEW - 1
        assert turn.cache_tokens == one.cache.get_seq_length() == length


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_answers_are_those_of_the_whole_conversation_read_anew(family: str) -> None:
    one, said = talk(word_model(family, **ALL_READ)), set()
    for question in QUESTIONS:
        prompt, wanted = afresh(one, question)
        turn = one.ask(question, NEW)
        assert turn.answer == wanted
        check_held(one, prompt)
        said.add(wanted)
    assert len(said) > 1


@pytest.mark.parametrize("document", [DOCUMENT, "w20"])
def test_of_a_short_question_nothing_else_is_read(document: str) -> None:
    one = talk(word_model(**ALL_READ), document=document)
    for question in ("w11", "w12"):
        prompt, wanted = afresh(one, question)
        held = len(one.held)
        turn = one.ask(question, NEW)
        assert turn.answer == wanted
        assert turn.tokens_read == len(prompt) - held < 10
        check_held(one, prompt)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_template_that_rewrites_history(family: str) -> None:
    """The cache is cropped to what stays; where a sliding window has moved on (Gemma 2), all is
    read again."""
    model = word_model(family, **ALL_READ)
    one = talk(model, word_tokenizer(REWRITTEN))
    first, _ = afresh(one, QUESTIONS[0])
    one.ask(QUESTIONS[0], NEW)
    prompt, wanted = afresh(one, QUESTIONS[1])
    turn = one.ask(QUESTIONS[1], NEW)
    assert turn.answer == wanted
    check_held(one, prompt)
    assert prompt[: len(first)] == first  # and then an answer that nobody gave
    assert turn.tokens_read == len(prompt) - (len(first) if family == "llama" else 0)


def test_answers_that_are_spelt_otherwise_than_they_were_generated() -> None:
    """Bytes that are no text come back as other tokens."""
    model = word_model(**ALL_READ)
    model.resize_token_embeddings(257)
    tokenizer = byte_tokenizer()
    broken = [i for i in range(257) if tokenizer.decode([i]) == "\N{REPLACEMENT CHARACTER}"]
    model.generation_config.suppress_tokens = sorted({*range(257)} - {*broken})
    tokenizer.chat_template = TEMPLATE
    one, texts = talk(model, tokenizer), []
    for question in QUESTIONS:
        prompt, wanted = afresh(one, question)
        assert one.ask(question, NEW).answer == wanted
        check_held(one, prompt)
        texts.append(wanted)
    assert all("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_an_answer_that_is_cut_off_before_its_first_token_is_read() -> None:
    one = talk(word_model(**ALL_READ))
    for question in QUESTIONS:
        wanted = afresh(one, question)[1].split()[0]
        turn = one.ask(question, 1)
        assert (turn.answer, turn.tokens_per_s) == (wanted, None)


def test_a_model_without_a_template_answers_in_lines() -> None:
    tokenizer = byte_tokenizer()
    model = word_model(**ALL_READ)
    model.resize_token_embeddings(257)
    (newline,) = tokenizer.encode("\n")
    letter = tokenizer.encode("a")
    model.generation_config.suppress_tokens = [i for i in range(257) if i not in (newline, *letter)]
    one = talk(model, tokenizer, "It was so.")
    assert tokenizer.decode(one.document_ids) == "User: It was so.\n\n"
    with counted(model) as rows:
        model.lm_head.register_forward_hook(
            lambda module, args, logits: logits.index_fill(
                2, torch.tensor([newline]), 50.0 if len(rows) % 4 == 3 else -50.0
            )
        )
        assert one.ask("Why?", 20).answer == "aaa"
    assert tokenizer.decode(one.held) == "User: It was so.\n\nWhy?\nAssistant:aaa"
    prompt = one.encode(one.render([*one.messages, one._question("How?")]))
    assert (
        tokenizer.decode(prompt)
        == "User: It was so.\n\nWhy?\nAssistant:aaa\nUser: How?\nAssistant:"
    )


# files


def test_a_document_from_a_file_is_answered_about_as_one_that_was_read(tmp_path: Path) -> None:
    """Also where only some keys are read."""
    model, file = word_model(), tmp_path / "document.cache"
    read = talk(model)
    read.save_document(file)
    loaded = Conversation(model, word_tokenizer(), DOCUMENT, chunk=100)
    with counted(model) as rows:
        loaded.load_document(file)
        assert not rows
        turns = [loaded.ask(question, NEW) for question in QUESTIONS]
    assert rows[0] == turns[0].tokens_read == len(f"{QUESTIONS[0]} </s> <s> assistant".split())
    assert [turn.answer for turn in turns] == [
        read.ask(question, NEW).answer for question in QUESTIONS
    ]
    assert turns[0].keys_read < 0.6


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    model, file = word_model(), tmp_path / "document.cache"
    talk(model).save_document(file)
    finetuned = word_model()
    with torch.no_grad():
        finetuned.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    others = {
        "document": Conversation(model, word_tokenizer(), DOCUMENT + " w20", chunk=100),
        "weights": Conversation(finetuned, word_tokenizer(), DOCUMENT, chunk=100),
        "chunk": Conversation(model, word_tokenizer(), DOCUMENT, chunk=99),
        "budget": Conversation(word_model(budget=64), word_tokenizer(), DOCUMENT, chunk=100),
    }
    for what, other in others.items():
        with pytest.raises(ValueError, match=rf"got a cache made with {what}=.*, allowed: {what}="):
            other.load_document(file)
        assert other.cache.get_seq_length() == 0


# Ctrl-C


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: what a shell starts in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def pressed(model: PreTrainedModel, *passes: int) -> Iterator[None]:
    """Ctrl-C in the middle of these forward passes."""
    rows: list[int] = []

    def press(module: Any, args: Any) -> None:
        rows.append(1)
        if len(rows) in passes:
            signal.raise_signal(signal.SIGINT)

    hook = model.model.layers[1].register_forward_pre_hook(press)
    yield
    hook.remove()


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_ends_the_answer_and_the_conversation_goes_on(at: int) -> None:
    model, before = word_model(**ALL_READ), signal.getsignal(signal.SIGINT)
    one = talk(model)
    _, wanted = afresh(one, QUESTIONS[0])
    with pressed(model, at):
        turn = one.ask(QUESTIONS[0], NEW)
    assert turn.interrupted
    assert turn.answer.split() == wanted.split()[:at]
    assert "(interrupted)" in str(turn)
    assert signal.getsignal(signal.SIGINT) is before
    prompt, wanted = afresh(one, QUESTIONS[1])
    turn = one.ask(QUESTIONS[1], NEW)
    assert not turn.interrupted
    assert turn.answer == wanted
    check_held(one, prompt)


def test_a_second_interrupt_is_not_held_back(ctrl_c: None) -> None:
    model, before = word_model(), signal.getsignal(signal.SIGINT)
    one = talk(model)
    with pytest.raises(KeyboardInterrupt), pressed(model, 2), pressed(model, 2):
        one.ask(QUESTIONS[0], NEW)
    assert signal.getsignal(signal.SIGINT) is before
    assert not one.messages


@pytest.mark.parametrize("at", [1, 2, 4])  # the prompt, the first token of the answer, a later one
def test_an_answer_that_fails_costs_the_conversation_nothing(at: int) -> None:
    """Nor is anything that had been read by then taken for something else."""

    class Broken(TextStreamer):
        left = at

        def put(self, value: torch.Tensor) -> None:
            self.left -= 1
            if not self.left:
                raise OSError("no space left on device")

    one = talk(word_model(**ALL_READ))
    one.ask(QUESTIONS[0], NEW)
    with pytest.raises(OSError, match="no space left"):
        one.ask(QUESTIONS[1], NEW, Broken(one.tokenizer))
    assert {layer.get_seq_length() for layer in one.cache.layers} == {len(one.held)}
    prompt, wanted = afresh(one, QUESTIONS[2])
    assert one.ask(QUESTIONS[2], NEW).answer == wanted
    check_held(one, prompt)


# what is shown


def test_the_line_below_an_answer_is_right() -> None:
    model = word_model()
    one = talk(model)
    turn = one.ask(QUESTIONS[0], NEW)
    densities = [row.share for row in explain(model)]  # of the last step
    assert turn.keys_read == pytest.approx(fmean(densities))
    assert 0.1 < turn.keys_read < 0.9
    assert 0 < turn.first_token_s < turn.seconds
    assert turn.tokens_per_s == pytest.approx(
        (NEW - 1) / (turn.seconds - turn.first_token_s), rel=0.5
    )
    pages = -(-one.cache.get_seq_length() // 64)
    kept = (
        len(model.model.layers) * pages * 64 * 2 * 2 * 16 * 4 / 2**20
    )  # keys and values of two heads of 16, fp32
    assert kept <= turn.cache_mib < 1.5 * kept
    length = len(f"<s> user {DOCUMENT} {QUESTIONS[0]} </s> <s> assistant".split()) + NEW - 1
    line = (
        r"(?P<seconds>[\d.]+) s: 19 tokens read in (?P<first>[\d.]+) s, "
        r"6 new ones at [\d.]+ a second, "
        rf"{turn.keys_read:.0%} of the keys read; cache: {length} tokens, {turn.cache_mib:.0f} MiB"
    )
    assert (found := re.fullmatch(line, str(turn)))
    assert float(found["seconds"]) == pytest.approx(turn.seconds, abs=0.01)
    assert float(found["first"]) == pytest.approx(turn.first_token_s, abs=0.01)


def test_answers_are_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    one = talk(word_model())
    turn = one.ask(
        QUESTIONS[0], NEW, TextStreamer(one.tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    assert capsys.readouterr().out == turn.answer + "\n"


def test_questions_are_typed_until_the_input_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter([" w11 ", "", KeyboardInterrupt(), "w12", EOFError(), "w13"])

    def typed(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", typed)
    assert list(chat.questions([])) == ["w11", "w12"]
    assert list(chat.questions(["w20"])) == ["w20"]
