"""`hip-hf compare`: several methods or settings side by side: captured mass and cost, perplexity, pass keys, needles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer
from rich.progress import Progress

from hip_hf.config import HiPConfig
from hip_hf.eval import fidelity, needles, passkey, perplexity
from hip_hf.eval.measure.curves import AT
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, NAMES, Device, Dtype, check_length, digest, load_to_measure
from hip_hf.eval.reporting import plots, report
from hip_hf.eval.reporting.presets import HELP, over_budgets, parse_choice, sizes
from hip_hf.eval.reporting.publish import Json, Output, Plot, Report, Results, Targets, measured_on
from hip_hf.eval.reporting.resumable import Cells

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
# Panels of the picture: column and label.
PANELS = {
    "mass": "share of dense attention captured",
    "error": "relative output error",
    "perplexity": "perplexity",
    "pass_keys": "pass keys entirely right",
    "needle_digits": "digits of needles right",
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
    cells: Cells | None = None, bar: Progress | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each of the settings. `plan`: tokens, prompts, facts, depths, samples, seed."""
    cells = cells or Cells(None, {})
    tokens, prompts, seed = plan["tokens"], plan["prompts"], plan["seed"]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if "fidelity" in measures:
        chosen = {name: config for name, config in configs.items() if captures(config)}
        texts = fidelity.Plan(chosen, tokens, prompts, plan["facts"], seed=seed)
        advance = counter(bar, "fidelity", prompts)
        all_found = fidelity.measure_all(model, tokenizer, ids, texts, cells, advance)
        _, rows = all_found.rows([tokens], list(chosen))
        found["fidelity"] = {row["settings"]: row for row in rows}
    if "perplexity" in measures:
        reading = perplexity.Plan(configs, tokens, prompts, chunk=tokens)
        advance = counter(bar, "perplexity", len(configs) * prompts)
        rows = perplexity.measure(model, ids, reading, cells, advance)
        found["perplexity"] = {row["settings"]: row for row in rows if (row["from"], row["to"]) == (0, tokens)}
    if "passkey" in measures:
        asking = passkey.Plan(configs, [tokens], plan["depths"], plan["samples"], seed=seed)
        advance = counter(bar, "pass keys", asking.cells)
        rows = passkey.measure(model, tokenizer, ids, asking, cells, advance)
        found["passkey"] = {row["settings"]: row for row in rows if row["depth"] == "all"}
    if "needles" in measures:
        hunt = needles.Plan(configs, [tokens], prompts, plan["facts"], seed)
        advance = counter(bar, "needles", hunt.cells(1))
        rows = needles.measure(model, tokenizer, {"document": ids}, hunt, cells, advance)
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


def draw(document: dict[str, Any], file: Path) -> None:
    """What was measured against keys read, a curve for each setting over its budgets; by name where keys are not counted."""
    plt = plots.pyplot()
    rows = document["rows"]
    panels = [name for name in PANELS if any(row.get(name) is not None for row in rows)]
    names = list(dict.fromkeys(row["settings"].partition(AT)[0] for row in rows))
    counted = any(row.get("keys_read") is not None for row in rows)
    size = (5.2 * len(panels), 4.4 + 0.05 * len(names))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            own = [row for row in rows if row["settings"].partition(AT)[0] == name and row.get(panel) is not None]
            style = dict(color=f"C{i % 10}", linestyle="-" if i < 10 else "--", label=fill(name, 44))
            places = [row.get("keys_read") if counted else i for row in own]
            if own and None in places:  # dense: a level to compare with
                axis.axhline(own[0][panel], linewidth=1, **{**style, "linestyle": ":"})
            elif own:
                axis.plot(*zip(*sorted(zip(places, (row[panel] for row in own), strict=True)), strict=True), marker="o", **style)
        axis.set_ylabel(PANELS[panel])
        axis.set_xlabel("keys read per row, mean" if counted else "settings, in the order of the table")
        axis.grid(alpha=0.3)
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    figure.suptitle(fill(document["title"], 70 * len(panels)), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(
    model: Annotated[str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")] = str(CHECKPOINT),
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["dense", "defaults", "paper", "streaming"],  # noqa: B006
    measures: Annotated[str, typer.Option(help=f"Of {', '.join(MEASURES)}.")] = ",".join(MEASURES),
    budgets: Annotated[str, typer.Option(help="Every setting with each of these budgets, like 256,512.")] = "256",
    sink: Annotated[int | None, typer.Option(help="First keys, always read.")] = None,
    window: Annotated[int | None, typer.Option(help="Latest keys, always read.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of each text and prompt.")] = 8192,
    prompts: Annotated[int, typer.Option(min=1, help="Texts for fidelity, perplexity and needles.")] = 2,
    facts: Annotated[int, typer.Option(min=1, max=len(NAMES), help="Pass keys in each text for fidelity and needles.")] = 8,
    depths: Annotated[int, typer.Option(min=1, help="Depths of the pass keys.")] = 11,
    samples: Annotated[int, typer.Option(min=1, help="Pass keys for each depth.")] = 2,
    document: Annotated[Path, typer.Option(help="Plain text to measure on.")] = DOCUMENT,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: Report = None,
    json: Json = False,
) -> None:
    """Compare methods or settings on one checkpoint, every layer and row sparse unless settings say otherwise."""
    try:
        chosen = parse_choice(measures, MEASURES, "--measures")
        configs = over_budgets(settings, sizes(budgets), tokens=tokens, checkpoint=model, sink=sink, window=window)
        targets = Targets(json, output, plot, report_file)
        if "perplexity" in chosen:
            perplexity.Plan(configs, tokens, prompts, chunk=tokens)
        if "fidelity" in chosen and not any(captures(config) for config in configs.values()):
            raise ValueError("--settings: got dense attention alone, allowed: with --measures fidelity another one as well")
        text = document.read_text(encoding="utf-8")
        plan = dict(tokens=tokens, prompts=prompts, facts=facts, depths=depths, samples=samples, seed=seed)
        details = measured_on(model, document, dtype, configs, **plan)
        cells = targets.cells("compare", **details, device=device, text=digest(text))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    loaded, tokenizer, ids = load_to_measure(model, device, text, dtype)
    check_length(tokens, ids, document)
    with cells, report.progress() as bar:
        try:
            rows = measure(loaded, tokenizer, ids, configs, chosen, plan, cells, bar)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    title = f"Methods and settings side by side, {tokens:,} tokens; pass keys and perplexity ratios with 95 % intervals"
    targets.publish(Results("compare", title, rows, details, draw), cells)
