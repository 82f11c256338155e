"""All tasks of `hip_longctx` on one checkpoint, for dense attention, hip, hip with Delta
correction, and StreamingLLM.

    python benchmarks/longctx.py --length 8192 --samples 10

Every layer and row is sparse; the document's seed, sample counts and 95 % intervals go with each
figure. Writes `benchmarks/results/longctx.json` and the table `longctx.md`. A run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Annotated, Any

import typer

from hip_hf.cli.inputs import user_errors
from hip_hf.cli.presets import settings_of
from hip_hf.cli.publish import Targets, model_name
from hip_hf.eval.measure.documents import CHECKPOINT

RESULTS = Path(__file__).parent / "results"
TASKS = [
    "hip_passkey", "hip_passkeys", "hip_niah_single", "hip_niah_multikey", "hip_niah_multivalue",
    "hip_niah_multiquery", "hip_variable_tracking", "hip_common_words", "hip_frequent_words",
    "hip_key_value", "hip_copying", "hip_perplexity",
]  # fmt: skip
# Settings to compare, as in `hip-hf compare`.
SETTINGS = ["dense", "defaults", "delta", "streaming"]
Z = NormalDist().inv_cdf(0.975)


def evaluate(lm: Any, task: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Scores of every document of a task (for perplexity: losses), and the share of keys read, by
    lm-eval's Python API."""
    import lm_eval

    lm.read.clear()
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[task], metadata=metadata, batch_size=1, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    metric = "nll" if task == "hip_perplexity" else "acc"
    return {
        "scores": [sample[metric] for sample in found["samples"][task]],
        **lm.read.summary()["keys_read"],
    }


def interval(scores: list[float], perplexity: bool) -> tuple[float, float, float]:
    """Mean and 95 % interval. Shares of right answers: Wilson's, with the mean share as the
    proportion; losses: normal, and `exp` of all three."""
    mean, count = fmean(scores), len(scores)
    if perplexity:
        half = Z * stdev(scores) / math.sqrt(count) if count > 1 else math.inf
        return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
    centre = mean + Z * Z / (2 * count)
    spread = Z * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count))
    return mean, (centre - spread) / (1 + Z * Z / count), (centre + spread) / (1 + Z * Z / count)


def markdown(rows: list[dict[str, Any]], caption: str) -> str:
    """A line for each task, a column for each of the settings."""
    settings = list(dict.fromkeys(row["settings"] for row in rows))
    lines = [caption, "", f"| task | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = {row["settings"]: row for row in rows if row["task"] == task}
        form = (lambda x: f"{x:.2f}") if task == "hip_perplexity" else (lambda x: f"{x:.0%}")
        cells = [
            f"{form(row['value'])} [{form(row['low'])}, {form(row['high'])}]"
            for row in own.values()
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    model: str = str(CHECKPOINT),
    length: int = 8192,
    samples: int = 10,
    budget: int = 256,
    seed: int = 0,
    settings: Annotated[list[str], typer.Option(help="As in `hip-hf compare`.")] = SETTINGS,
    tasks: str = ",".join(TASKS),
    output: Path = RESULTS / "longctx.json",
) -> None:
    """Evaluate, and write the table."""
    from hip_hf.integration.lm_eval.registration import register

    register()
    from hip_hf.integration.lm_eval.model import HipLM

    configs = settings_of(settings, tokens=length, checkpoint=model, budget=budget)
    metadata = {
        "max_seq_lengths": [length],
        "samples": samples,
        "data_seed": seed,
        "tokenizer": model,
    }
    details = {
        "model": model_name(model), "length": length, "samples": samples, "data_seed": seed,
        "configs": {name: config.to_dict() for name, config in configs.items()},
    }  # fmt: skip
    with user_errors():
        targets = Targets(output=output)
        kept = targets.kept("longctx", **details)
    lm = HipLM(model, device="cpu", max_length=length)
    rows = []
    kept.expect("tasks", len(configs) * len(tasks.split(",")))
    with kept:
        for task in tasks.split(","):
            for name, config in configs.items():

                def work(task: str = task, config: Any = config) -> dict[str, Any]:
                    lm.use(config)
                    return evaluate(lm, task, metadata)

                found = kept.get((task, name), work)
                value, low, high = interval(found["scores"], task == "hip_perplexity")
                rows.append({
                    "task": task, "settings": name, "value": value, "low": low, "high": high,
                    "samples": len(found["scores"]), "read_prefill": found["prefill"],
                    "read_decode": found["decode"],
                })  # fmt: skip
    title = (
        f"hip_longctx, {length:,} tokens, budget {budget}, {samples} samples a task, seed {seed}, "
        "95 % intervals"
    )
    targets.publish("longctx", title, rows, details, kept)
    caption = f"{title}; {model_name(model)}. Shares of right answers; hip_perplexity: perplexity."
    output.with_suffix(".md").write_text(markdown(rows, caption), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
