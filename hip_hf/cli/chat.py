"""`hip-hf chat`: questions about one document. It is read once, and each turn computes its new
tokens only."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import TextStreamer
from typer import Option

from hip_hf.cli import inputs
from hip_hf.cli.publish import Json
from hip_hf.eval.measure.chat import Conversation
from hip_hf.eval.measure.generate import lengthen
from hip_hf.eval.reporting import report
from hip_hf.integration.settings import text_config

_QUESTION = "Ask this; may be repeated. Without it: type questions, or pipe them in, one a line."
_CACHE = "File that keeps the document as it was read: loaded if it is there, else written."
TOKENS = Option(min=1, help="Make the document so long: cut, or the text over again.")
CHUNK = Option(min=1, help="How many tokens of the document to read at a time.")
EXTEND = "--set extend=streaming --set dense_tail=0"


def questions(given: list[str]) -> Iterator[str]:
    """Those given; without any, what is typed at a prompt until the input ends (Ctrl-D), or the
    lines of a piped input."""
    asks = not given and sys.stdin.isatty()
    for line in typed() if asks else given or sys.stdin:
        if question := line.strip():
            if not asks:
                report.note(f"> {question}")
            yield question


def typed() -> Iterator[str]:
    """Lines typed at a prompt. Ctrl-C there drops the line."""
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def fill(talk: Conversation, file: Path | None) -> bool:
    """Get the document into the cache, from the file if there is one, else by reading it. Whether
    it was loaded."""
    if file is not None and file.exists():
        otherwise = "; give another file, or delete it and the document is read again"
        with inputs.user_errors("--cache", after=otherwise):
            talk.load_document(file)
        return True
    if file is not None:  # say now if it could not be written once the document has been read
        beside: dict[str, Any] = dict(prefix=f".{file.name}.", dir=file.absolute().parent)
        unwritten = inputs.user_errors("--cache", f"cannot write {str(file)!r}: ")
        with unwritten, tempfile.TemporaryDirectory(**beside) as folder:
            talk.cache.save(Path(folder) / file.name)
    with report.counting("reading the document, tokens", len(talk.document_ids)) as advance:
        talk.read_document(advance)
    return False


def main(
    model: inputs.Checkpoint,
    document: Annotated[Path, Option(help="Text file to ask about.")],
    question: Annotated[list[str] | None, Option(help=_QUESTION)] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, Option(min=0.0, help="Of sampling; 0: greedy.")] = 0.0,
    seed: Annotated[int, Option(help="Of sampling.")] = 0,
    cache: Annotated[Path | None, Option(help=_CACHE)] = None,
    set_: inputs.SetFields = None,
    dtype: inputs.Dtype = "auto",
    tokens: Annotated[int | None, TOKENS] = None,
    chunk: Annotated[int, CHUNK] = 2048,
    device: inputs.Device = "cpu",
    as_json: Json = False,
) -> None:
    """Answer questions about a document, which is read once: each answer costs its new tokens
    only."""
    text, on = inputs.read_text(document, "--document"), inputs.check_device(device)
    net, tokenizer, settings = inputs.load_or_exit(model, "hip", inputs.parse_fields(set_), dtype)
    ids = inputs.tokens_of(tokenizer, text, document, "--document")
    if tokens is not None:
        text = tokenizer.decode(lengthen(ids, tokens), skip_special_tokens=True)
    talk = Conversation(net.to(on), tokenizer, text, chunk)
    start = time.perf_counter()
    loaded = fill(talk, cache)
    read_s = time.perf_counter() - start
    longest = getattr(text_config(net), "max_position_embeddings", inf)
    done = f"{len(talk.held):,} tokens {'loaded' if loaded else 'read'} in {read_s:.2f} s"
    report.note(f"{document.name}: {done}", style="dim")
    if cache is not None and not loaded:
        talk.save_document(cache)
    torch.manual_seed(seed)
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    turns = []
    for asked in questions(question or []):
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        shown = None if as_json else streamer
        turns.append(turn := talk.ask(asked, max_new_tokens, shown, **options))
        report.note(str(turn), style="dim")
        if settings.extend is None and turn.cache_tokens > longest:
            made_for = f"longer than the {longest:,} tokens that the model is made for"
            report.note(f"{made_for}: {EXTEND}", style="dim")
    if as_json:
        about = {"tokens": len(talk.document_ids), "loaded": loaded, "seconds": read_s}
        details = dict(document=about, chunk=chunk, settings=settings.to_dict())
        report.show(f"chat: {model}", [asdict(turn) for turn in turns], True, **details)
