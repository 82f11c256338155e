"""Several methods or settings side by side: captured mass and cost, perplexity, pass keys, needles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.progress import Progress

from hip_hf.config import HiPConfig
from hip_hf.eval.measure import fidelity, needles, passkey, perplexity
from hip_hf.eval.reporting.resumable import Resumable

MEASURES = ("fidelity", "perplexity", "passkey", "needles")
# What the table takes of a command's rows: {column: its name there}.
COLUMNS = {
    "fidelity": {name: name for name in ("keys_read", "mass", "of_oracle", "worst_layer", "error", "cost", "bytes_share")},
    "perplexity": {"perplexity": "perplexity", "ratio": "ratio", "ratio_low": "ratio_low", "ratio_high": "ratio_high"},
    "passkey": {"pass_keys": "accuracy", "low": "low", "high": "high", "digits": "digits", "samples": "samples"},
    "needles": {
        "needle_digits": "digits",
        "needle_answers": "answers_right",
        "needle_nll": "nll",
        "needle_ratio": "perplexity_over_dense",
    },
}


def captures(config: HiPConfig) -> bool:
    """Whether `fidelity` has something to measure: dense attention captures everything."""
    return config.method != "dense"


def counter(bar: Progress | None, what: str, total: int) -> Callable[[], None]:
    """What counts one step of a new line of the progress bar, if there is one."""
    if bar is None:
        return lambda: None
    task = bar.add_task(what, total=total)
    return lambda: bar.advance(task)


def measure(
    model: Any, tokenizer: Any, ids: list[int], configs: dict[str, HiPConfig], measures: list[str], plan: dict[str, int],
    kept: Resumable | None = None, bar: Progress | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each of the settings. `plan`: tokens, prompts, facts, depths, samples, seed."""
    kept = kept or Resumable(None, {})
    tokens, prompts, seed = plan["tokens"], plan["prompts"], plan["seed"]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if "fidelity" in measures:
        chosen = {name: config for name, config in configs.items() if captures(config)}
        texts = fidelity.FidelityPlan(chosen, tokens, prompts, plan["facts"], seed=seed)
        advance = counter(bar, "fidelity", prompts)
        all_found = fidelity.measure_all(model, tokenizer, ids, texts, kept, advance)
        _, rows = all_found.rows([tokens], list(chosen))
        found["fidelity"] = {row["settings"]: row for row in rows}
    if "perplexity" in measures:
        reading = perplexity.PerplexityPlan(configs, tokens, prompts, chunk=tokens)
        advance = counter(bar, "perplexity", len(configs) * prompts)
        rows = perplexity.measure(model, ids, reading, kept, advance)
        found["perplexity"] = {row["settings"]: row for row in rows if (row["from"], row["to"]) == (0, tokens)}
    if "passkey" in measures:
        asking = passkey.PasskeyPlan(configs, [tokens], plan["depths"], plan["samples"], seed=seed)
        advance = counter(bar, "pass keys", asking.pieces)
        rows = passkey.measure(model, tokenizer, ids, asking, kept, advance)
        found["passkey"] = {row["settings"]: row for row in rows if row["depth"] == "all"}
    if "needles" in measures:
        hunt = needles.NeedlesPlan(configs, [tokens], prompts, plan["facts"], seed)
        advance = counter(bar, "needles", hunt.pieces(1))
        rows = needles.measure(model, tokenizer, {"document": ids}, hunt, kept, advance)
        found["needles"] = {row["settings"]: row for row in rows}
    table = []
    for name in configs:
        row: dict[str, Any] = {"settings": name}
        for measure, columns in COLUMNS.items():
            if measure in found:
                own = found[measure].get(name, {})
                row |= {column: own.get(source) for column, source in columns.items()}
        table.append(row)
    return table
