"""Many requests of all kinds to one served model, eight at once: does its memory grow, is an answer
not `generate`'s, does one fail?

    python benchmarks/serving_soak.py runs/smollm2 [--requests 500] [--no-continuous-batching]
        [--set budget=128] [--output FILE]

Six of ten requests want an answer, two hang up in the middle of a long one, the others are refused:
a prompt that does not fit, a chat without messages. Every answer is compared with that of
`generate` in this process, which takes as long again. The server's memory is noted before, and
after every fiftieth request; `growth` is what it grew by in the second half. After the first
prompts of full length it must not grow.

With continuous batching an answer may be another than `generate`'s where a prompt is split
(`--batch-tokens`) and pruned: `other` counts them. It must be 0 without continuous batching, or
where no prompt is split: with `--batch-tokens` three times `--longest`, twice for what the cache
holds and once for the next prompt.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from served import NEW_TOKENS, serving, settings_options, soak

from hip_hf.cli import inputs
from hip_hf.cli.publish import Json, Output, Targets
from hip_hf.eval.measure import documents, generate
from hip_hf.eval.measure.generate import lengthen

PAGE = 256  # tokens


def main(
    model: str,
    requests: Annotated[int, typer.Option(min=4)] = 500,
    every: Annotated[int, typer.Option(min=1)] = 50,
    longest: Annotated[
        int, typer.Option(min=PAGE, help="Tokens of the longest prompt; they begin at one.")
    ] = 8000,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    batch_tokens: int = 2048,
    continuous_batching: bool = True,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of HiPConfig; may be repeated.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Ask, and print the table."""
    net, tokenizer, _ = inputs.load_or_exit(model, "hip", inputs.parse_fields(set_ or []), "auto")
    net.generation_config.eos_token_id = None  # every answer has its full length
    ids = tokenizer.encode(
        documents.DOCUMENT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    )
    room = 2 * longest  # two of the longest at once, or many short ones: the others wait
    batching = [
        "--continuous-batching",
        "--cb-num-blocks",
        str(-(-room // PAGE)),
        "--cb-max-batch-tokens",
        str(batch_tokens),
    ]

    def text(tokens: int, seed: int) -> str:
        start = 997 * seed % (len(ids) // 2)
        return str(tokenizer.decode(lengthen(ids[start:], tokens)))

    def generated(prompt: str) -> str:
        made = generate.generate(net, tokenizer.encode(prompt, verbose=False), NEW_TOKENS)
        return str(tokenizer.decode(made.ids, skip_special_tokens=True))

    details: dict[str, Any] = {
        "model": Path(model).name,
        "longest": longest,
        "clients": clients,
        "batch_tokens": batch_tokens,
    }
    details["set"] = set_ or []
    options = [
        "--max-model-len",
        str(room),
        *(batching if continuous_batching else []),
        *settings_options(set_ or []),
    ]
    load = [os.getloadavg()[0]]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(model, *options, log=Path(folder) / "log") as server,
    ):
        rows = soak(server, text, generated, requests, every, longest, 2 * room, clients)
    load.append(os.getloadavg()[0])
    growth = rows[-1]["resident_MiB"] - rows[len(rows) // 2]["resident_MiB"]
    title = (
        f"{requests} requests of up to {longest} tokens to hip-hf serve, {details['model']}; "
        f"second half: {growth:+.0f} MiB"
    )
    extra = {
        **details,
        "continuous_batching": continuous_batching,
        "growth_MiB": growth,
        "load_before_and_after": load,
    }
    Targets(as_json, output).publish("serving_soak", title, rows, extra)


if __name__ == "__main__":
    typer.run(main)
