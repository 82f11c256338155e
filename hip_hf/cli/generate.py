"""`hip-hf generate`: continue a prompt with any checkpoint, and say how long it took and what
attention did."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hip_hf.cli import inputs
from hip_hf.eval.measure.generate import generate, lengthen
from hip_hf.eval.reporting import report
from hip_hf.integration.explain import Report
from hip_hf.integration.settings import NAMES


def memory_line(memory: dict[str, float | None]) -> str:
    """The memory of a run in words."""
    parts = []
    for name, words in (
        ("cache", "the cache"),
        ("peak", "the host's peak"),
        ("device_peak", "the device's peak"),
    ):
        if (value := memory[name]) is not None:
            parts.append(f"{words} {value:,.0f} MiB")
    return (
        f"memory on top of the model: {', '.join(parts)}"
        if parts
        else "memory: this system does not say"
    )


def print_layers(title: str, layers: Report) -> None:
    """`explain`'s table on the error stream, untouched by markup and line breaks."""
    if layers:
        report.notes.print(f"\n{title}\n{layers}", highlight=False, markup=False, soft_wrap=True)


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint: a hub name or a folder.")],
    prompt_file: Annotated[Path, typer.Option(help="Text file to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    attn: Annotated[
        str, typer.Option(help="Attention implementation: hip, streaming, sdpa, eager ...")
    ] = "hip",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of HiPConfig; may be repeated.")
    ] = None,
    dtype: inputs.Dtype = "auto",
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Make the prompt so long: cut, or the text over again."),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Read the prompt so many tokens at a time.")
    ] = None,
    device: inputs.Device = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document instead of text.")
    ] = False,
) -> None:
    """Continue a prompt, greedily; timings and what each layer did go to the error stream."""
    if set_ and attn not in NAMES:
        raise typer.BadParameter(
            f"settings apply to --attn {' | '.join(NAMES)}, got {attn!r}", param_hint="--set"
        )
    text, on = inputs.read_text(prompt_file, "--prompt-file"), inputs.check_device(device)
    net, tokenizer, settings = inputs.load(model, attn, inputs.parse_fields(set_ or []), dtype)
    prompt = inputs.tokens_of(tokenizer, text, prompt_file, "--prompt-file")
    if tokens is not None:
        prompt = lengthen(prompt, tokens)
    net.to(on)
    with report.counting("tokens", len(prompt) + max_new_tokens - 1) as advance:
        result = generate(net, prompt, max_new_tokens, chunk, advance)
    answer = tokenizer.decode(result.ids, skip_special_tokens=True)
    rate = result.tokens_per_s
    if as_json:
        timing = {
            "first_token_s": result.first_token_s,
            "decode_s": result.decode_s,
            "decode_tokens_per_s": rate,
        }
        tokens_of = {"prompt_tokens": len(prompt), "new_tokens": len(result.ids)}
        report.show(
            f"generate: {model}, {attn}",
            [asdict(row) for row in result.prefill],
            True,
            text=answer,
            timing={**tokens_of, **timing},
            chunk=chunk,
            memory_mib=result.memory,
            decode_rows=[asdict(row) for row in result.decode],
            settings=settings.to_dict() if attn in NAMES else None,
        )
        return
    print(answer)
    speed = "" if rate is None else f", then {rate:.1f} tokens/s"
    counts = f"{attn}, {len(prompt)} prompt tokens and {len(result.ids)} new ones"
    report.notes.print(
        f"{counts}: the first after {result.first_token_s:.2f} s{speed}",
        highlight=False,
        soft_wrap=True,
    )
    report.notes.print(memory_line(result.memory), highlight=False, soft_wrap=True)
    print_layers("prompt", result.prefill)
    print_layers("last decode step", result.decode if rate is not None else Report())
