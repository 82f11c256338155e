"""Every method on one checkpoint at equal keys read: fidelity, perplexity and pass keys side by side.

    python benchmarks/compare_methods.py --budgets 256,512

Every layer and row is sparse. Writes `benchmarks/results/methods.json`, a table `methods.md` and the picture `methods.png`.
Perplexity is that of texts of the document with pass keys hidden in them and asked for, as in `hip-hf fidelity`; the
rows before the middle exceeds the budget, which all methods read alike, are left out.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hip_hf.config import HiPConfig
from hip_hf.eval import fidelity, passkey, report
from hip_hf.eval.curves import AT
from hip_hf.eval.documents import CHECKPOINT, DOCUMENT, load
from hip_hf.eval.presets import settings_of, sizes

RESULTS = Path(__file__).parent / "results"


@torch.inference_mode()
def perplexity(model: Any, config: HiPConfig, texts: list[list[int]]) -> float:
    """Of the tokens whose rows a selection of this budget concerns."""
    passkey.use(model, config)
    skip = config.sink + config.window + config.budget + config.block_q
    loss = []
    for text in texts:
        ids = torch.tensor([text], device=model.device)
        logits = model(ids, use_cache=False).logits[0, skip:-1].float()
        loss.append(torch.nn.functional.cross_entropy(logits, ids[0, skip + 1 :]))
    return math.exp(torch.stack(loss).mean())


def run(command: Any, model: str, output: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows that a command of `hip-hf` writes; what an interrupted comparison has finished is not done again."""
    if not output.exists():
        arguments = [f"--{name.replace('_', '-')}={value}" for name, values in options.items()
                     for value in (values if isinstance(values, list) else [values])]  # fmt: skip
        app = typer.Typer()
        app.command()(command)
        app([model, *arguments, f"--output={output}"], standalone_mode=False)
    return json.loads(output.read_text())["rows"]


def main(
    model: str = str(CHECKPOINT),
    document: Path = DOCUMENT,
    tokens: int = 8192,
    budgets: str = "256,512",
    prompts: Annotated[int, typer.Option(help="Texts for fidelity and perplexity.")] = 2,
    depths: int = 11,
    samples: Annotated[int, typer.Option(help="Pass keys for each depth.")] = 2,
    seed: int = 0,
    folder: Annotated[Path, typer.Option(help="Where parts are kept until all is done.")] = RESULTS / "methods",
) -> None:
    """Compare all methods."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = sizes(budgets)
    common: dict[str, Any] = dict(document=document, tokens=tokens, prompts=prompts, seed=seed)
    faithful = run(
        fidelity.main, model, folder / "fidelity.json", settings="all", budgets=budgets, plot=RESULTS / "methods.png", **common
    )
    loaded, tokenizer = load(model, "sdpa")
    body = tokenizer.encode(document.read_text(), add_special_tokens=False, verbose=False)
    starts = [(len(body) - tokens) * i // max(prompts - 1, 1) for i in range(prompts)]
    texts = [
        fidelity.make_text(tokenizer, body[start : start + tokens], 8, random.Random(f"{seed} {i}"))
        for i, start in enumerate(starts)
    ]
    table = []
    for budget in counts:
        keys = run(
            passkey.main, model, folder / f"passkey_{budget}.json", settings=["dense", "all"], budget=budget, lengths=tokens,
            depths=depths, samples=samples, document=document, seed=seed,
        )  # fmt: skip
        for name, config in settings_of(["dense", "all"], tokens=tokens, budget=budget).items():
            (right,) = (row for row in keys if row["settings"] == name and row["depth"] == "all")
            own = [row for row in faithful if row["settings"] == f"{name}{AT}{budget}" and row["layer"] == "all"]
            best = [row for row in faithful if row["settings"] == f"oracle{AT}{budget}" and row["layer"] == "all"]
            part = (
                {
                    name: own[0][name]
                    for name in ("keys_read", "mass", "low_5pct", "worst_head", "error", "overlap", "cost", "bytes_share")
                }
                if own
                else {}
            )
            table.append(
                {"budget": budget, "method": name, **part, "of_oracle": own[0]["mass"] / best[0]["mass"] if own else None,
                 "perplexity": perplexity(loaded, config, texts), "pass_keys": right["accuracy"], "digits": right["digits"],
                 "samples": right["samples"]}
            )  # fmt: skip
            report.notes.print(table[-1])
    layers = [row for row in faithful if row["layer"] != "all"]
    details = dict(tokens=tokens, prompts=prompts, seed=seed, model=Path(model).name, document=document.name)
    hardness = json.loads((folder / "fidelity.json").read_text()).get("hardness")
    result = dict(rows=table, layers=layers, hardness=hardness, **details, machine=report.machine())
    (RESULTS / "methods.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "methods.md").write_text(markdown(table))
    shutil.rmtree(folder)
    report.show("All methods", table, False)


def markdown(table: list[dict[str, Any]]) -> str:
    """The table, for the documentation."""
    names = [name for name in table[1] if name not in ("budget", "samples")]
    lines = []
    for budget in dict.fromkeys(row["budget"] for row in table):
        lines += [
            f"Budget {budget}:",
            "",
            f"| {' | '.join(name.replace('_', ' ') for name in names)} |",
            "|" + "---|" * len(names),
        ]
        for row in table:
            if row["budget"] == budget:
                cells = [row.get(name) for name in names]
                text = ["-" if c is None else c if isinstance(c, str) else f"{c:.4g}" for c in cells]
                lines.append(f"| {' | '.join(text)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
