"""`hip-hf explain`: what each layer of a checkpoint does with a prompt of some length, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer

from hip_hf.cli.inputs import Dtype, load, parse_fields
from hip_hf.eval.reporting import report
from hip_hf.integration.explain import explain
from hip_hf.integration.settings import NAMES, text_config


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint: a hub name or a folder.")],
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 4096,
    attn: Annotated[str, typer.Option(help=" or ".join(NAMES))] = "hip",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of HiPConfig; may be repeated.")
    ] = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the prompt's tokens, which are random.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document instead of a table.")
    ] = False,
) -> None:
    """Run one prompt of random tokens through a checkpoint and show each layer's path."""
    if attn not in NAMES:
        raise typer.BadParameter(f"got {attn!r}, allowed: {' | '.join(NAMES)}", param_hint="--attn")
    net, _, settings = load(model, attn, parse_fields(set_ or []), dtype)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(text_config(net).vocab_size, (1, tokens), generator=random)
    with torch.no_grad():
        net(input_ids=ids, use_cache=False, logits_to_keep=1)
    layers = explain(net)
    if as_json:
        report.show(
            f"explain: {model}, {tokens} tokens",
            [asdict(row) for row in layers],
            True,
            settings=settings.to_dict(),
        )
    else:
        print(layers)
