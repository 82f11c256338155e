"""`hip-hf passkey`: hide a pass key at every depth of a long document, ask for it, and count the answers that are right."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import NormalDist, fmean
from textwrap import fill
from typing import Annotated, Any

import torch
import typer

from hip_hf.config import HiPConfig
from hip_hf.eval.measure.documents import (
    CHECKPOINT,
    DIGITS,
    DOCUMENT,
    NAMES,
    Device,
    Dtype,
    Fact,
    answer_of,
    digest,
    load_to_measure,
    make_prompt,
)
from hip_hf.eval.reporting import plots, report
from hip_hf.eval.reporting.presets import HELP, settings_of, sizes
from hip_hf.eval.reporting.publish import Json, Output, Plot, Report, Results, Targets, measured_on
from hip_hf.eval.reporting.resumable import Cells
from hip_hf.integration.api import configure
from hip_hf.integration.explain import Row, explain

# An answer is a space and one token per digit; tokenizers that need fewer stop earlier or say more, which is cut off.
ANSWER_TOKENS = DIGITS + 1


def draw_facts(rng: random.Random, depths: list[float]) -> list[Fact]:
    """A fact with its own name and key for each depth."""
    keys = ["".join(rng.choices("0123456789", k=DIGITS)) for _ in depths]
    return [Fact(*fact) for fact in zip(rng.sample(NAMES, len(depths)), keys, depths, strict=True)]


def make_sample(
    tokenizer: Any, text: list[int], length: int, depth: float, facts: int, rng: random.Random
) -> tuple[list[int], str]:
    """A prompt that leaves room for its answer within `length` tokens, and the key that it asks for.

    The document is a random window of `text`. `facts - 1` other facts are hidden at random depths.
    """
    room = length - ANSWER_TOKENS
    start = rng.randrange(max(len(text) - room, 0) + 1)
    hidden = draw_facts(rng, [depth, *(rng.random() for _ in range(facts - 1))])
    return make_prompt(tokenizer, text[start : start + room], room, hidden, hidden[0].name), hidden[0].key


def digits_right(answer: str, key: str) -> int:
    """How many digits of the key the answer has in their place."""
    return sum(a == b for a, b in zip(answer, key, strict=False))


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a proportion."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre, spread = right + z * z / 2, z * math.sqrt(right * (count - right) / count + z * z / 4)
    return (centre - spread) / (count + z * z), (centre + spread) / (count + z * z)


@dataclass
class Witness:
    """A logits processor that changes nothing: it asks `explain` what the attention did, in prefill and in decode."""

    model: Any
    prefill: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.prefill:
            self.prefill = explain(self.model)
        else:
            self.decode = explain(self.model)
        return scores


def path_of(rows: list[Row]) -> str:
    """`sparse`, `dense`, or how many layers went which way and why."""
    kinds = [row.path if row.path == "sparse" else f"{row.path} ({row.reason})" for row in rows]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return next(iter(counts), "-") if len(counts) <= 1 else ", ".join(f"{count} {kind}" for kind, count in counts.items())


@dataclass
class Cell:
    """What was counted at one length and depth with one setting."""

    samples: int = 0
    exact: int = 0
    digits: int = 0
    prefill: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)

    def add(self, answer: str, key: str) -> None:
        self.samples += 1
        self.exact += answer == key
        self.digits += digits_right(answer, key)

    def __add__(self, other: Cell) -> Cell:
        counts = (self.samples + other.samples, self.exact + other.exact, self.digits + other.digits)
        return Cell(*counts, self.prefill + other.prefill, self.decode + other.decode)

    @classmethod
    def read(cls, saved: dict[str, Any]) -> Cell:
        """The cell that `asdict` made this from."""
        rows = {phase: [Row(**row) for row in saved[phase]] for phase in ("prefill", "decode")}
        return cls(**{**saved, **rows})

    def row(self, settings: str, length: int, depth: float | None) -> dict[str, Any]:
        """One row of the report; no `depth` means all of them."""
        low, high = wilson(self.exact, self.samples)
        shares = [[row.share for row in rows if row.share is not None] for rows in (self.prefill, self.decode)]
        read = [fmean(share) if share else 1.0 for share in shares]
        caches = ", ".join(dict.fromkeys(row.cache for row in self.decode))
        return {
            "settings": settings,
            "length": length,
            "depth": "all" if depth is None else f"{depth:.2f}",
            "accuracy": self.exact / self.samples,
            "low": low,
            "high": high,
            "digits": self.digits / (self.samples * DIGITS),
            "samples": self.samples,
            "read_prefill": read[0],
            "read_decode": read[1],
            "path_prefill": path_of(self.prefill) if self.prefill else "sdpa",
            "path_decode": path_of(self.decode) if self.decode else "sdpa",
            "cache": caches or "-",
        }


def use(model: Any, config: HiPConfig) -> bool:
    """Let the model attend by these settings; `dense` goes through PyTorch's SDPA. Whether `explain` has something to say."""
    sparse = config.method != "dense"
    model.set_attn_implementation("hip" if sparse else "sdpa")
    if sparse:
        configure(model, config)
    return sparse


def ask(model: Any, tokenizer: Any, samples: list[tuple[list[int], str]], sparse: bool) -> Cell:
    """Generate the answers of a batch of prompts of one length, greedily, and count what is right."""
    ids = torch.tensor([prompt for prompt, _ in samples], device=model.device)
    witness = Witness(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        logits_processor=[witness] if sparse else [],
    )
    cell = Cell(prefill=list(witness.prefill), decode=list(witness.decode))
    for tokens, (_, key) in zip(out[:, ids.shape[1] :], samples, strict=True):
        cell.add(answer_of(tokenizer, tokens)[:DIGITS], key)
    return cell


def batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


@dataclass(frozen=True)
class Plan:
    """What to ask: `samples` prompts for each setting, length and depth, the same ones whatever the settings."""

    configs: dict[str, HiPConfig]
    lengths: Sequence[int]
    depths: int = 11
    samples: int = 10
    facts: int = 1
    batch: int = 4
    seed: int = 0

    @property
    def places(self) -> list[float]:
        """Evenly spaced depths."""
        return [i / (self.depths - 1) for i in range(self.depths)] if self.depths > 1 else [0.5]

    @property
    def cells(self) -> int:
        return len(self.configs) * len(self.lengths) * self.depths

    def prompts(self, tokenizer: Any, text: list[int], length: int, place: float) -> list[tuple[list[int], str]]:
        """Prompts and keys of one length and depth. Raises ValueError for a length that does not fit the text."""
        draws = [random.Random(f"{self.seed} {length} {place:.6f} {i}") for i in range(self.samples)]
        return [make_sample(tokenizer, text, length, place, self.facts, rng) for rng in draws]


def measure(
    model: Any, tokenizer: Any, text: list[int], plan: Plan, cells: Cells, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """The rows of the report, of what `cells` has not yet; `advance` is called after each setting, length and depth.

    Raises:
        ValueError: a length does not fit the text.
    """
    rows = []
    for name, config in plan.configs.items():
        sparse = use(model, config)
        for length in plan.lengths:

            def count(place: float, length: int = length, sparse: bool = sparse) -> dict[str, Any]:
                prompts = plan.prompts(tokenizer, text, length, place)
                answers = [ask(model, tokenizer, some, sparse) for some in batches(iter(prompts), plan.batch)]
                return asdict(sum(answers, Cell()))

            counted = {}
            for place in plan.places:
                key = ("passkey", config.to_dict(), length, place)
                counted[place] = Cell.read(cells.get(key, partial(count, place)))
                advance()
            rows.append(sum(counted.values(), Cell()).row(name, length, None))
            rows += [cell.row(name, length, place) for place, cell in counted.items()]
    return rows


def draw(document: dict[str, Any], file: Path) -> None:
    """The heat map: accuracy by depth, a line for every length and setting."""
    pyplot = plots.pyplot()
    cells = [row for row in document["rows"] if row["depth"] != "all"]
    lines = list(dict.fromkeys((row["settings"], row["length"]) for row in cells))
    depths = list(dict.fromkeys(row["depth"] for row in cells))
    grid = [[math.nan] * len(depths) for _ in lines]
    for row in cells:
        grid[lines.index((row["settings"], row["length"]))][depths.index(row["depth"])] = row["accuracy"]
    labels = [fill(f"{name}, {length:,}", 44) for name, length in lines]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    size = (3 + 0.6 * len(depths) + 0.09 * longest, 1.5 + sum(0.5 + 0.2 * label.count("\n") for label in labels))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(depths)), depths)
    axes.set_yticks(range(len(lines)), labels)
    axes.set_xlabel("depth of the pass key (0: beginning of the document)")
    axes.set_ylabel("settings, length in tokens")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="answers entirely right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(
    model: Annotated[str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")] = str(CHECKPOINT),
    lengths: Annotated[str, typer.Option(help="Tokens of document, question and answer, like 4096,8K.")] = "8192",
    depths: Annotated[int, typer.Option(min=1, help="Evenly spaced depths, from beginning to end.")] = 11,
    samples: Annotated[int, typer.Option(min=1, help="Prompts for each length and depth.")] = 10,
    facts: Annotated[int, typer.Option(min=1, max=len(NAMES), help="Pass keys in each document; one is asked for.")] = 1,
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["dense", "defaults"],  # noqa: B006
    budget: Annotated[int | None, typer.Option(help="Keys selected per query block.")] = None,
    sink: Annotated[int | None, typer.Option(help="First keys, always read.")] = None,
    window: Annotated[int | None, typer.Option(help="Latest keys, always read.")] = None,
    document: Annotated[Path, typer.Option(help="Plain text to hide the keys in.")] = DOCUMENT,
    batch: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 4,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: Report = None,
    json: Json = False,
) -> None:
    """Hide pass keys in long documents and count right answers, every layer and row sparse unless settings say otherwise."""
    try:
        counts = sizes(lengths)
        targets = Targets(json, output, plot, report_file)
        configs = settings_of(settings, tokens=max(counts), checkpoint=model, budget=budget, sink=sink, window=window)
        text = document.read_text(encoding="utf-8")
        plan = Plan(configs, counts, depths, samples, facts, batch, seed)
        details = measured_on(model, document, dtype, configs, facts=facts, seed=seed)
        cells = targets.cells("passkey", **details, samples=samples, batch=batch, device=device, text=digest(text))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    loaded, tokenizer, tokens = load_to_measure(model, device, text, dtype)

    with cells, report.progress() as progress:
        task = progress.add_task("pass keys", total=plan.cells)
        try:
            rows = measure(loaded, tokenizer, tokens, plan, cells, lambda: progress.advance(task))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    title = f"Pass keys: answers entirely right, with the 95 % interval ({facts} fact{'s' * (facts > 1)} per document)"
    targets.publish(Results("passkey", title, rows, details, draw), cells)
