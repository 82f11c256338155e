"""Several methods or settings side by side: captured mass and cost, perplexity, pass keys,
needles."""

from __future__ import annotations

from typing import Any

from hip_hf.config import HiPConfig
from hip_hf.eval.measure import fidelity, needles, passkey, perplexity
from hip_hf.eval.reporting.resumable import Resumable, Rows


def same(names: str) -> dict[str, str]:
    """Columns that have the same name in a command's rows."""
    return {name: name for name in names.split()}


MEASURES = ("fidelity", "perplexity", "passkey", "needles")
# What the table takes of a command's rows: {column: its name there}.
COLUMNS = {
    "fidelity": same("keys_read mass of_oracle worst_layer error cost bytes_share"),
    "perplexity": same("perplexity ratio ratio_low ratio_high"),
    "passkey": {"pass_keys": "accuracy", **same("low high digits samples")},
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


def measure_settings(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    configs: dict[str, HiPConfig],
    measures: list[str],
    plan: dict[str, int],
    kept: Resumable | None = None,
) -> Rows:
    """A row for each of the settings. `plan`: tokens, prompts, facts, depths, samples, seed."""
    kept = kept or Resumable()
    tokens, prompts, facts, seed = (plan[name] for name in ("tokens", "prompts", "facts", "seed"))
    found: dict[str, Rows] = {}
    if "fidelity" in measures:
        chosen = {name: config for name, config in configs.items() if captures(config)}
        texts = fidelity.FidelityPlan(chosen, tokens, prompts, facts, seed=seed)
        captured = fidelity.measure_all(model, tokenizer, ids, texts, kept)
        _, found["fidelity"] = captured.rows([tokens], list(chosen))
    if "perplexity" in measures:
        reading = perplexity.PerplexityPlan(configs, tokens, prompts, chunk=tokens)
        rows = perplexity.perplexity_rows(model, ids, reading, kept)
        found["perplexity"] = [row for row in rows if (row["from"], row["to"]) == (0, tokens)]
    if "passkey" in measures:
        asking = passkey.PasskeyPlan(configs, [tokens], plan["depths"], plan["samples"], seed=seed)
        rows = passkey.passkey_rows(model, tokenizer, ids, asking, kept)
        found["passkey"] = [row for row in rows if row["depth"] == "all"]
    if "needles" in measures:
        hunt = needles.NeedlesPlan(configs, [tokens], prompts, facts, seed)
        found["needles"] = needles.needles_rows(model, tokenizer, {"document": ids}, hunt, kept)
    table: dict[str, dict[str, Any]] = {name: {"settings": name} for name in configs}
    for name, columns in COLUMNS.items():
        own = {row["settings"]: row for row in found.get(name, ())}
        for settings, row in table.items() if name in found else ():
            row |= {column: own.get(settings, {}).get(source) for column, source in columns.items()}
    return list(table.values())
