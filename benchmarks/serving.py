"""A served model, `sdpa` against `hip`: seconds to the first token and new tokens a second, at 1, 4
and 8 clients at once.

    python benchmarks/serving.py runs/smollm2 --output benchmarks/results/serving.json
        --plot benchmarks/results/serving.png

Two servers (`hip-hf serve --continuous-batching`) are up side by side, one idle while the other is
asked. Rounds alternate between them; each figure is the median over rounds, and the first token's
over the clients of a round before. Every prompt begins with words of its own, so that no server has
its keys from an earlier round. `tokens_per_s` is of all clients together, from the first request to
the last token, prompts included. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from served import Served, complete_all, serving, settings_options
from transformers import AutoTokenizer

from hip_hf.cli.inputs import user_errors
from hip_hf.cli.publish import Json, Output, Plot, Targets, model_name
from hip_hf.eval.measure.documents import DOCUMENT
from hip_hf.eval.measure.generate import lengthen

ATTENTIONS = ("sdpa", "hip")
PAGE = 256  # tokens
Lengths = Annotated[str, typer.Option(help="Tokens of each prompt.")]


def prompts(tokenizer: Any, ids: list[int], tokens: int, name: str, count: int) -> list[str]:
    """Make `count` texts of about `tokens` tokens that all begin differently."""
    texts = []
    for i in range(count):
        first = tokenizer.encode(f"{name}, client {i}. ", add_special_tokens=False)
        texts.append(tokenizer.decode(first + lengthen(ids, tokens)[: tokens - len(first)]))
    return texts


def ask(server: Served, texts: list[str], new_tokens: int) -> dict[str, Any]:
    """One round: all prompts at once."""
    start = time.perf_counter()
    answers = complete_all(server.client(timeout=None), server.model, texts, new_tokens)
    seconds = time.perf_counter() - start
    return {
        "first_token_s": median(answer.first_token_s for answer in answers),
        "tokens_per_s": sum(answer.usage["completion_tokens"] for answer in answers) / seconds,
        "prompt_tokens": median(answer.usage["prompt_tokens"] for answer in answers),
    }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of `hip`'s rows as times of `sdpa`'s: under 1 is good for the first token, above 1 for
    tokens a second."""
    dense = {(row["tokens"], row["clients"]): row for row in rows if row["attention"] == "sdpa"}
    found = []
    for row in (row for row in rows if row["attention"] == "hip"):
        other = dense[row["tokens"], row["clients"]]
        times = {
            f"{name}_of_sdpa": row[name] / other[name] for name in ("first_token_s", "tokens_per_s")
        }
        found.append({"tokens": row["tokens"], "clients": row["clients"], **times})
    return found


def main(
    model: str,
    lengths: Lengths = "2048,4096,8192",
    clients: str = "1,4,8",
    new_tokens: int = 64,
    rounds: int = 3,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a forward pass, of all requests together.")
    ] = 2048,
    continuous_batching: bool = True,
    dtype: Annotated[
        str, typer.Option(help="What the model computes in; auto: as it was saved.")
    ] = "auto",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of HiPConfig, for `hip`.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure, and write the table, the document and the picture."""
    sizes, counts = ([int(part) for part in given.split(",")] for given in (lengths, clients))
    details = {
        "model": model_name(Path(model).name), "lengths": sizes, "clients": counts,
        "new_tokens": new_tokens, "rounds": rounds, "batch_tokens": batch_tokens,
        "continuous_batching": continuous_batching, "dtype": dtype, "set": set_ or [],
    }  # fmt: skip
    with user_errors():
        targets = Targets(as_json, output, plot)
        kept = targets.kept("serving", **details)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(
        DOCUMENT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    )
    blocks = max(counts) * (-(-(max(sizes) + new_tokens) // PAGE) + 1)
    room = [
        "--cb-num-blocks",
        str(blocks),
        "--cb-block-size",
        str(PAGE),
        "--cb-max-batch-tokens",
        str(batch_tokens),
    ]
    batching = ["--continuous-batching", *room] if continuous_batching else []
    settings = settings_options(set_ or [])
    found: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for name in ATTENTIONS:
            own = settings if name == "hip" else []
            options = ["--attn-implementation", name, "--dtype", dtype, *batching, *own]
            servers[name] = stack.enter_context(serving(model, *options, log=folder / name))
            # what is made once
            ask(servers[name], prompts(tokenizer, ids, min(sizes), "first of all", 1), 2)
        stack.enter_context(kept)
        kept.expect("rounds", len(sizes) * len(counts) * rounds * len(ATTENTIONS))
        for tokens in sizes:
            for count in counts:
                for i in range(rounds):
                    texts = prompts(
                        tokenizer,
                        ids,
                        tokens,
                        f"{tokens} tokens, {count} clients, round {i}",
                        count,
                    )
                    for name in ATTENTIONS:

                        def work(name: str = name, texts: list[str] = texts) -> dict[str, Any]:
                            return ask(servers[name], texts, new_tokens)

                        found.setdefault((tokens, count, name), []).append(
                            kept.get((tokens, count, i, name), work)
                        )
    rows = [
        {
            "tokens": tokens,
            "clients": count,
            "attention": name,
            **{key: median(one[key] for one in all_) for key in all_[0]},
        }
        for (tokens, count, name), all_ in found.items()
    ]
    title = (
        f"hip-hf serve, {details['model']}, {dtype}: median of {rounds} rounds, "
        f"{new_tokens} new tokens a request"
    )
    ratios = compare(rows)
    tables = {title: rows, "hip, as times of sdpa": ratios}
    targets.publish("serving", title, rows, {**details, "ratios": ratios}, kept, tables)


if __name__ == "__main__":
    typer.run(main)
