"""`hip-hf generate`: continue a prompt with any checkpoint, and say how long it took and what
attention did."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Option

from hip_hf.cli import inputs
from hip_hf.cli.publish import Json
from hip_hf.eval.measure.generate import generate, lengthen
from hip_hf.eval.reporting import report
from hip_hf.integration.explain import Report
from hip_hf.integration.settings import NAMES

ATTN = Option(help="Attention implementation: hip, streaming, sdpa, eager ...")
TOKENS = Option(min=1, help="Make the prompt so long: cut, or the text over again.")
CHUNK = Option(min=1, help="How many tokens of the prompt to read at a time.")
# What memory is called in words, by its name in JSON.
MEMORY = {"cache": "the cache", "peak": "the host's peak", "device_peak": "the device's peak"}


def memory_line(memory: dict[str, float | None]) -> str:
    """The memory of a run in words."""
    known = {name: value for name, value in memory.items() if value is not None}
    parts = [f"{words} {known[name]:,.0f} MiB" for name, words in MEMORY.items() if name in known]
    if not parts:
        return "memory: this system does not say"
    return f"memory on top of the model: {', '.join(parts)}"


def print_layers(title: str, layers: Report) -> None:
    """`explain`'s table on the error stream."""
    if layers:
        report.note(f"\n{title}\n{layers}")


def main(
    model: inputs.Checkpoint,
    prompt_file: Annotated[Path, Option(help="Text file to continue.")],
    max_new_tokens: Annotated[int, Option(min=1)] = 64,
    attn: Annotated[str, ATTN] = "hip",
    set_: inputs.SetFields = None,
    dtype: inputs.Dtype = "auto",
    tokens: Annotated[int | None, TOKENS] = None,
    chunk: Annotated[int | None, CHUNK] = None,
    device: inputs.Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a prompt, greedily; timings and what each layer did go to the error stream."""
    if set_ and attn not in NAMES:
        line = f"settings apply to --attn {' | '.join(NAMES)}, got {attn!r}"
        raise BadParameter(line, param_hint="--set")
    text, on = inputs.read_text(prompt_file, "--prompt-file"), inputs.check_device(device)
    net, tokenizer, settings = inputs.load_or_exit(model, attn, inputs.parse_fields(set_), dtype)
    prompt = inputs.tokens_of(tokenizer, text, prompt_file, "--prompt-file")
    if tokens is not None:
        prompt = lengthen(prompt, tokens)
    net.to(on)
    with report.counting("tokens", len(prompt) + max_new_tokens - 1) as advance:
        result = generate(net, prompt, max_new_tokens, chunk, advance)
    answer = tokenizer.decode(result.ids, skip_special_tokens=True)
    rate = result.tokens_per_s
    if as_json:
        counts = {"prompt_tokens": len(prompt), "new_tokens": len(result.ids)}
        seconds = {"first_token_s": result.first_token_s, "decode_s": result.decode_s}
        timing = {**counts, **seconds, "decode_tokens_per_s": rate}
        details: dict[str, Any] = dict(text=answer, timing=timing, chunk=chunk)
        details["memory_mib"] = result.memory
        details["decode_rows"] = [asdict(row) for row in result.decode]
        details["settings"] = settings.to_dict() if attn in NAMES else None
        rows = [asdict(row) for row in result.prefill]
        report.show(f"generate: {model}, {attn}", rows, True, **details)
        return
    print(answer)
    speed = "" if rate is None else f", then {rate:.1f} tokens/s"
    what = f"{attn}, {len(prompt)} prompt tokens and {len(result.ids)} new ones"
    report.note(f"{what}: the first after {result.first_token_s:.2f} s{speed}")
    report.note(memory_line(result.memory))
    print_layers("prompt", result.prefill)
    print_layers("last decode step", result.decode if rate is not None else Report())
