"""The documentation's pictures, and tables of what the package has, from its own code, its
checkpoint and the saved results (`tables.py` has those of measured figures).

`PYTHONPATH=tests python docs/figures.py` draws the README's picture again.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sweep
import tables
import torch
from transformers.utils import logging

from hip_hf.config import HiPConfig
from hip_hf.eval.measure import demo, documents
from hip_hf.eval.measure.capture import capture
from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.pictures import PICTURES
from hip_hf.geometry import make_query_block
from hip_hf.methods.base import method_of
from hip_hf.methods.hip import Selector, TreeSearch
from hip_hf.problem import AttentionProblem
from hip_hf.registry import METHODS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOKENS, FACTS = 4096, 1
LAYER = 2
SMALL = dict(budget=128, window=256, sink=64, dense_tail=0, dense_below=0)


@dataclass(frozen=True)
class Watched(TreeSearch):
    """The tree search, noting the candidates of each level: (level, ids) of the first head and
    query block."""

    seen: list[tuple[int, list[int]]] = field(default_factory=list)

    def _gather(
        self, heads: slice, level: int, ids: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        self.seen.append((level, sorted(set(ids[0, 0].tolist()))))
        return super()._gather(heads, level, ids, end)


def prompt_and_model() -> tuple[list[int], Any, Any, Any]:
    """A prompt that hides a pass key, the model and tokenizer of the checkpoint, and the hidden
    fact."""
    model, tokenizer = documents.load(documents.CHECKPOINT, "sdpa")
    text = tokenizer.encode(
        documents.DOCUMENT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    )
    (fact,) = demo.make_facts(FACTS, seed=0)
    return documents.make_prompt(tokenizer, text, TOKENS, [fact], fact.name), model, tokenizer, fact


def draw_tree(file: Path, problem: AttentionProblem) -> None:
    """The search of one query block: the candidates of each level, and the blocks that it keeps."""
    config = HiPConfig(**SMALL, beam=1, rescore=1)
    selector = Selector(config)
    span = problem.spans[0]
    first = span.end // config.block_q * config.block_q - config.block_q
    block = make_query_block(config, first, first, first + config.block_q - 1, None, None)
    q, keys = problem.q[0].unflatten(0, (problem.k.shape[1], -1)), problem.k[0]
    pyramid = selector.make_pyramid(torch.float32)
    pyramid.extend(keys, block.window_start // config.block_k)
    search = Watched(config, selector.representative, q, keys, pyramid, problem.scale, None)
    kept = search.select(slice(0, 1), [block])[0, 0, 0].tolist()
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(10, 3.2), layout="constrained")
    levels = [(level, ids) for level, ids in search.seen]
    names = []
    for row, (level, ids) in enumerate(levels):
        size = config.block_k << level
        for i in ids:
            axis.barh(
                row,
                size,
                left=i * size,
                height=0.7,
                color="#9db7da",
                edgecolor="white",
                linewidth=0.5,
            )
        names.append(f"{len(ids)} chunks of {size} keys")
    for i in kept:
        axis.barh(
            len(levels),
            config.block_k,
            left=i * config.block_k,
            height=0.7,
            color=plots.BLOCK_KINDS["selected"],
        )
    axis.barh(len(levels), block.sink_end, left=0, height=0.7, color=plots.BLOCK_KINDS["sink"])
    axis.barh(
        len(levels),
        block.last + 1 - block.window_start,
        left=block.window_start,
        height=0.7,
        color=plots.BLOCK_KINDS["window"],
    )
    axis.set_yticks(range(len(levels) + 1), [*names, "what is read"])
    axis.invert_yaxis()
    axis.set_xlim(0, block.last + 1)
    axis.set_xlabel("key position (token)")
    axis.set_ylabel("level of the search")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_readings(
    file: Path, prompt: list[int], problems: list[AttentionProblem], tokenizer: Any, fact: Any
) -> None:
    """Which key blocks each query block reads, in two layers."""
    config = HiPConfig(**SMALL)
    panels = []
    for layer in (1, LAYER):
        kinds, path = demo.kinds_read(problems[layer], config, layer=None)  # type: ignore[arg-type]
        panels.append(plots.Panel(f"layer {layer}: {path}", kinds, config.block_q, config.block_k))
    marks = {fact.name: demo.position_of(tokenizer, prompt, fact)}
    question = len(prompt) - len(
        tokenizer.encode(documents.question(fact.name), add_special_tokens=False)
    )
    plots.readings(
        file,
        f"What query blocks read (first key head), {TOKENS:,} tokens",
        panels,
        len(prompt),
        marks,
        question,
    )


def methods() -> str:
    """The table of methods and their options, from what each declares."""
    lines = []
    for name in METHODS:
        method = method_of(name)
        options = ", ".join(f"`{option.name}`" for option in dataclasses.fields(method.options))
        lines.append([f"`{name}`", method.summary, options])
    return tables.table(["method", "reads, besides sink and window", "options"], lines)


def not_extending() -> str:
    """The methods that do not work under context extension, from what each declares."""
    return ", ".join(f"`{name}`" for name in METHODS if not method_of(name).extends) + "\n"


def machines() -> str:
    """A table of the machines and versions that saved results say they were measured with."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for file in sorted(tables.RESULTS.glob("*.json")):
        machine = tables.read(file.stem)["machine"]
        key = tuple(
            str(machine[name]) for name in ("cpu", "threads", "python", "torch", "transformers")
        )
        groups.setdefault(key, []).append(f"`{file.name}`")
    columns = ["results", "processor", "threads", "Python", "PyTorch", "Transformers"]
    return tables.table(columns, [[", ".join(files), *key] for key, files in groups.items()])


def outdated(file: Path) -> bool:
    """Whether a file is missing, or older than the code that it is made by."""
    newest = max(
        source.stat().st_mtime for source in [*(ROOT / "hip_hf").rglob("*.py"), Path(__file__)]
    )
    return not file.exists() or file.stat().st_mtime < newest


def make_all(folder: Path) -> None:
    """Everything that the pages include, in `folder`; what takes long stays while it is newer than
    the code."""
    folder.mkdir(exist_ok=True)
    logging.set_verbosity_error()
    if outdated(folder / "tree.png") or outdated(folder / "readings.png"):
        prompt, model, tokenizer, fact = prompt_and_model()
        problems = capture(model, torch.tensor([prompt]))
        draw_tree(folder / "tree.png", problems[LAYER])
        draw_readings(folder / "readings.png", prompt, problems, tokenizer, fact)
    for name in ("latency", "fidelity", "passkey", "memory"):
        PICTURES[name](tables.read(name), folder / f"{name}.png")
    (folder / "answers.md").write_text(tables.answers(), encoding="utf-8")
    (folder / "methods.md").write_text(methods(), encoding="utf-8")
    (folder / "not_extending.md").write_text(not_extending(), encoding="utf-8")
    (folder / "machines.md").write_text(machines(), encoding="utf-8")
    (folder / "models.md").write_text(sweep.page(sweep.read_record()), encoding="utf-8")


if __name__ == "__main__":  # the README's picture, anew
    make_all(HERE / "_generated")
    shutil.copy(HERE / "_generated" / "readings.png", HERE / "readings.png")
