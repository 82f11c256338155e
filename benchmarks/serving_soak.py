"""Many requests of all kinds to one served model, eight at once: does its memory grow, does an answer change, does one fail?

    python benchmarks/serving_soak.py runs/smollm2 [--requests 500] [--no-continuous-batching] [--output FILE]

Half of the requests want an answer, a fifth hang up in the middle of a long one, the others are refused: a prompt that does
not fit, a chat without messages. The server's memory is noted before, and after every fiftieth request; `growth` is what it
grew by in the second half. After the first prompts of full length it must not grow.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from hip_hf.eval.documents import DOCUMENT
from hip_hf.eval.publish import Json, Output, Results, Targets
from hip_hf.eval.served import Served, soak

PAGE = 256  # tokens


def main(
    model: str,
    requests: Annotated[int, typer.Option(min=4)] = 500,
    every: Annotated[int, typer.Option(min=1)] = 50,
    longest: Annotated[int, typer.Option(min=PAGE, help="Tokens of the longest prompt; they begin at one.")] = 8000,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    batch_tokens: int = 2048,
    continuous_batching: bool = True,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Ask, and print the table."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(DOCUMENT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    room = 2 * longest  # two of the longest at once, or many short ones: the others wait
    batching = ["--continuous-batching", "--cb-num-blocks", str(-(-room // PAGE)), "--cb-max-batch-tokens", str(batch_tokens)]

    def text(tokens: int, seed: int) -> str:
        start = 997 * seed % (len(ids) // 2)
        return str(tokenizer.decode((ids[start:] * (1 + tokens // (len(ids) // 2)))[:tokens]))

    details: dict[str, Any] = {"model": Path(model).name, "longest": longest, "clients": clients, "batch_tokens": batch_tokens}
    options = ["--max-model-len", str(room), *(batching if continuous_batching else [])]
    with tempfile.TemporaryDirectory() as folder, Served(model, *options, log=Path(folder) / "log") as server:
        rows = soak(server, text, requests, every, longest, 2 * room, clients)
    growth = rows[-1]["resident_MiB"] - rows[len(rows) // 2]["resident_MiB"]
    title = f"{requests} requests of up to {longest} tokens to hip-hf serve, {details['model']}; second half: {growth:+.0f} MiB"
    extra = {**details, "continuous_batching": continuous_batching, "growth_MiB": growth}
    Targets(as_json, output).publish(Results("serving_soak", title, rows, extra))


if __name__ == "__main__":
    typer.run(main)
