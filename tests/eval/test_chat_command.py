"""The command `hip-hf chat`: questions from options and pipes, a document's file, and what is
refused before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chats import DOCUMENT, NEW, QUESTIONS, talk, word_model, word_tokenizer
from typer.testing import CliRunner

from hip_hf import HiPCache
from hip_hf.cli import chat
from hip_hf.eval.measure import generate
from hip_hf.eval.measure.chat import Conversation
from hip_hf_cli import app

LONGEST = 200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = word_model()
    model.config.max_position_embeddings = LONGEST
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "document.txt").write_text(DOCUMENT)
    return str(folder)


def run(checkpoint: str, *arguments: object, typed: str | None = None) -> Any:
    given = [
        "chat",
        checkpoint,
        "--document",
        f"{checkpoint}/document.txt",
        "--max-new-tokens",
        NEW,
        *arguments,
    ]
    return CliRunner(env={"COLUMNS": "400", "TERM": "dumb"}).invoke(
        app, [str(word) for word in given], input=typed
    )


def test_the_command_asks_what_it_is_given(checkpoint: str, tmp_path: Path) -> None:
    asked = [word for question in QUESTIONS for word in ("--question", question)]
    cache = ("--cache", tmp_path / "document.cache", "--set", "budget=48")
    first = run(checkpoint, *asked, *cache, "--json")
    assert first.exit_code == 0, first.output
    shown = json.loads(first.stdout)
    assert shown["document"] | {"seconds": 0} == {"tokens": 152, "loaded": False, "seconds": 0}
    assert shown["settings"]["budget"] == 48
    assert [row["question"] for row in shown["rows"]] == list(QUESTIONS)
    assert list(tmp_path.iterdir()) == [tmp_path / "document.cache"]
    second = json.loads(run(checkpoint, *asked, *cache, "--json").stdout)
    assert second["document"]["loaded"]
    for name in ("answer", "tokens_read", "tokens_new", "keys_read", "cache_tokens"):
        assert [row[name] for row in second["rows"]] == [row[name] for row in shown["rows"]]
    # piped questions, answers alone on the output stream
    piped = run(checkpoint, *cache, typed="\n".join([*QUESTIONS, "", " "]))
    assert piped.exit_code == 0, piped.output
    assert piped.stdout.splitlines() == [row["answer"] for row in shown["rows"]]
    said = piped.stderr.splitlines()
    assert [line for line in said if line.startswith("> ")] == [
        f"> {question}" for question in QUESTIONS
    ]
    assert any(line.startswith("document.txt: 152 tokens loaded in ") for line in said)
    for row in shown["rows"]:
        assert any(
            re.search(
                rf" s: {row['tokens_read']} tokens .* cache: {row['cache_tokens']} tokens,", line
            )
            for line in said
        )


def test_a_document_may_be_cut_and_answers_sampled(checkpoint: str) -> None:
    given = ("--tokens", 40, "--question", "w11", "--temperature", 5.0, "--json")
    shown = [json.loads(run(checkpoint, *given, "--seed", seed).stdout) for seed in (1, 1, 2)]
    assert shown[0]["document"]["tokens"] == 42
    answers = [one["rows"][0]["answer"] for one in shown]
    assert answers[0] == answers[1] != answers[2]


def test_a_conversation_beyond_the_trained_length_is_warned_of(checkpoint: str) -> None:
    result = run(checkpoint, "--tokens", LONGEST, "--question", "w11")
    assert (
        "longer than the 200 tokens that the model is made for: --set extend=streaming"
        in result.stderr
    )
    assert "longer than" not in run(checkpoint, "--question", "w11").stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--document", "/nowhere.txt"), "cannot read '/nowhere.txt'"),
        (("--document", "EMPTY"), "is empty"),
        (("--set", "budget=7"), "a multiple of block_k"),
        (("--cache", "/nowhere/document.cache"), "cannot write '/nowhere/document.cache'"),
        (("--cache", "EMPTY"), "got a truncated or foreign file"),
        (("--cache", "FOREIGN"), "got a cache made with document="),
    ],
)
def test_the_command_refuses_before_it_reads(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    what: str,
) -> None:
    (tmp_path / "EMPTY").write_text(" \n")
    other = talk(word_model(), document="w20 w21 w22")
    other.save_document(tmp_path / "FOREIGN")

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a token was computed")

    monkeypatch.setattr(generate, "generate", work)
    result = run(
        checkpoint,
        *(tmp_path / word if word.isupper() else word for word in arguments),
        "--question",
        "w11",
    )
    assert result.exit_code == 2, result.output
    assert what in " ".join(result.output.replace("│", " ").split())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["EMPTY", "FOREIGN"]


def test_a_model_whose_cache_has_no_file_is_refused_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Conversation(word_model(), word_tokenizer(), DOCUMENT)
    one.cache.layers[1] = object()
    with pytest.raises(
        Exception, match="got a object, allowed: full-attention and sliding-window layers"
    ):
        chat.fill(one, tmp_path / "document.cache")
    assert type(one.cache) is HiPCache
    assert list(tmp_path.iterdir()) == []
