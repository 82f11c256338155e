"""`hip-hf explain`: what each layer of a checkpoint does with a prompt of some length, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
from typer import Option

from hip_hf.cli import inputs
from hip_hf.cli.publish import Json
from hip_hf.eval.reporting import report
from hip_hf.integration.explain import explain
from hip_hf.integration.settings import NAMES, text_config


def main(
    model: inputs.Checkpoint,
    tokens: Annotated[int, Option(help="Length of the prompt.", min=1)] = 4096,
    attn: Annotated[str, Option(help=" or ".join(NAMES))] = "hip",
    set_: inputs.SetFields = None,
    dtype: inputs.Dtype = "auto",
    seed: Annotated[int, Option(help="Of the prompt's tokens, which are random.")] = 0,
    as_json: Json = False,
) -> None:
    """Run one prompt of random tokens through a checkpoint and show each layer's path."""
    if attn not in NAMES:
        raise inputs.not_allowed("--attn", attn, NAMES)
    net, _, settings = inputs.load_or_exit(model, attn, inputs.parse_fields(set_), dtype)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(text_config(net).vocab_size, (1, tokens), generator=random)
    with torch.no_grad():
        net(input_ids=ids, use_cache=False, logits_to_keep=1)
    layers = explain(net)
    if as_json:
        title, rows = f"explain: {model}, {tokens} tokens", [asdict(row) for row in layers]
        report.show(title, rows, True, settings=settings.to_dict())
    else:
        print(layers)
