"""`hip-hf fidelity`: how much of dense attention a selection captures, layer by layer, beside the block oracle and its cost.

*Mass* is the share of the dense attention probability that falls on the keys kept (sink, selected blocks, window).
The oracle keeps the blocks with the largest true mass, under the same budget, sink, window and sharing of heads, so its
mass is the most that any selection of blocks reaches. Only *searched* rows count: those of query blocks whose middle is
longer than the budget. Where the budget covers the middle, everything is read and there is nothing to measure.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hip_hf.attention import attend, dense_reason
from hip_hf.config import HiPConfig
from hip_hf.eval import report
from hip_hf.eval.capture import DENSE, capture
from hip_hf.eval.costs import Cost, call_cost, total
from hip_hf.eval.curves import AT, draw
from hip_hf.eval.documents import CHECKPOINT, DOCUMENT, NAMES, load, make_prompt, note, question
from hip_hf.eval.hardness import TITLE as HARDNESS
from hip_hf.eval.hardness import Hardness, hardness, hardness_rows
from hip_hf.eval.passkey import draw_facts
from hip_hf.eval.presets import HELP, SPARSE, check_output, publish, refuse_extension, settings_of, sizes
from hip_hf.integration.settings import text_config
from hip_hf.methods.base import BlockMask, QueryBlock, query_blocks, squash
from hip_hf.problem import AttentionProblem, Span
from hip_hf.reference.sparse import DECODE_ROWS

# The fields that say which blocks there are to choose from, and how many may be chosen.
GEOMETRY = ("block_q", "block_k", "sink", "window", "budget", "group_shared")


def searched_blocks(problem: AttentionProblem, config: HiPConfig) -> list[tuple[int, QueryBlock]]:
    """The query blocks of a problem of one span whose middle exceeds the budget, with their place in its `BlockMask`."""
    (span,) = problem.spans
    relative = Span(0, 0, span.keys, 0, span.rows, span.position)
    blocks = query_blocks(config, relative, problem.q.shape[2] <= DECODE_ROWS, problem.sliding_window)
    return [(at, block) for at, block in enumerate(blocks) if block.middle > config.budget // config.block_k]


def probabilities(problem: AttentionProblem, head: int, block: QueryBlock) -> torch.Tensor:
    """Dense attention of a query block, for the query heads of one key head: `[G, rows, keys]`, in at least fp32.

    The keys are those from `block.start` to `block.last`. Attention that a layer gives to sink logits is left out.
    """
    (span,) = problem.spans
    dtype = torch.promote_types(problem.q.dtype, torch.float32)
    row, key, groups = span.row_start + block.row, span.key_start, problem.groups
    q = problem.q[span.batch, head * groups : (head + 1) * groups, row : row + block.rows].to(dtype) * problem.scale
    k = problem.k[span.batch, head, key + block.start : key + block.last + 1].to(dtype)
    logits = q @ k.T
    squash(logits, problem.softcap)
    own = logits[..., -block.rows :]
    own.masked_fill_(torch.ones(block.rows, block.rows, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    if problem.sliding_window is not None:
        position = torch.arange(block.start, block.last + 1, device=q.device)
        logits.masked_fill_(position <= position[-block.rows :, None] - problem.sliding_window, -torch.inf)
    return logits.softmax(-1)


def chosen(problem: AttentionProblem, mask: BlockMask, head: int, at: int) -> torch.Tensor:
    """The key blocks that the `at`-th query block reads, for the query heads of a key head: `[G, n]`."""
    (span,) = problem.spans
    indices = mask.indices[span.batch].unflatten(0, (problem.k.shape[1], -1))[head, :, at]  # [1 or G, most]
    count = int(mask.counts[span.batch, 0, at])  # the same for all heads
    return indices[:, :count].long().expand(problem.groups, -1)


def captured(problem: AttentionProblem, blocks: Sequence[tuple[int, QueryBlock]], masks: Sequence[BlockMask]) -> torch.Tensor:
    """Mass that each mask keeps, averaged over the rows of each block: `[masks, Hq, blocks]`. Memory is that of one block."""
    groups = problem.groups
    mass = torch.zeros(len(masks), problem.q.shape[1], len(blocks), dtype=torch.float64)
    for head in range(problem.k.shape[1]):
        for column, (at, block) in enumerate(blocks):
            p = probabilities(problem, head, block).mean(1)  # [G, keys]
            always = p[:, : block.sink - block.start].sum(-1) + p[:, block.window - block.start :].sum(-1)
            middle = p[:, block.sink - block.start : block.window - block.start]
            middle = middle.unflatten(-1, (-1, masks[0].block_k)).sum(-1)  # [G, key blocks]
            for i, mask in enumerate(masks):
                ids = chosen(problem, mask, head, at) - block.low
                mass[i, head * groups : (head + 1) * groups, column] = (always + middle.gather(-1, ids).sum(-1)).cpu()
    return mass


def exact_mass(problem: AttentionProblem, config: HiPConfig, blocks: Sequence[tuple[int, QueryBlock]]) -> torch.Tensor:
    """Mass `[Hq, blocks]` of the keys that HyperAttention reads exactly: its denominator without a sample, over the true one."""
    own = replace(config, delta=None, options={**config.options, "sample_size": 0})
    part, whole = (attend(problem, c, need_lse=True).lse for c in (own, DENSE))
    assert part is not None
    assert whole is not None
    share = (part.double() - whole.double()).exp()[0]  # [Hq, Tq]
    return torch.stack([share[:, block.row : block.row + block.rows].mean(-1) for _, block in blocks], dim=1).cpu()


def overlap(problem: AttentionProblem, blocks: Sequence[tuple[int, QueryBlock]], mask: BlockMask, oracle: BlockMask) -> float:
    """Share of the oracle's blocks that the mask has, too."""
    shares = []
    for head in range(problem.k.shape[1]):
        for at, block in blocks:
            a, b = (
                torch.zeros(problem.groups, block.high, dtype=torch.bool, device=problem.q.device).scatter_(1, ids, True)
                for ids in (chosen(problem, mask, head, at), chosen(problem, oracle, head, at))
            )
            shares.append(float((a & b).sum() / b.sum()))
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Measured:
    """One setting in one layer on one prompt: mass `[Hq, blocks]` and rows `[blocks]` of its searched query blocks;
    the squared norms of the output's error and of the dense output; the overlap with the oracle's blocks; the cost."""

    mass: torch.Tensor
    oracle: torch.Tensor
    rows: torch.Tensor
    error: float
    norm: float
    overlap: float | None  # None: the method chooses no blocks
    cost: Cost


def same_choice(config: HiPConfig) -> HiPConfig:
    """The oracle that chooses as many of the same blocks."""
    return HiPConfig(method="oracle", **SPARSE, **{name: getattr(config, name) for name in GEOMETRY})


def unsearched(problem: AttentionProblem, configs: Iterable[HiPConfig], layer: int | None) -> str:
    """Why there is nothing to measure in a layer for one of the settings, or an empty string."""
    for config in configs:
        config = config.for_layer(layer)
        reason, _ = dense_reason(problem, config, layer, stateless=True)
        if not reason and not searched_blocks(problem, config):
            reason = f"the budget of {config.budget} covers everything"
        if reason:
            return reason
    return ""


def measure(problem: AttentionProblem, configs: Sequence[HiPConfig], layer: int | None = None) -> list[Measured]:
    """What each setting captures of one layer's attention.

    Raises:
        ValueError: a setting has nothing to search here (`unsearched` says so beforehand).
    """
    dense = attend(problem, DENSE).out
    configs = [config.for_layer(layer) for config in configs]
    by_geometry: dict[tuple[Any, ...], list[int]] = {}
    for i, config in enumerate(configs):
        by_geometry.setdefault(tuple(getattr(config, name) for name in GEOMETRY), []).append(i)
    measured: dict[int, Measured] = {}
    for members in by_geometry.values():
        blocks = searched_blocks(problem, configs[members[0]])
        results = [attend(problem, configs[i], layer, need_mask=True) for i in members]
        best = attend(problem, same_choice(configs[members[0]]), need_mask=True).mask
        if not blocks or best is None or any(result.path != "sparse" for result in results):
            raise ValueError(f"settings: layer {layer} has nothing to search ({unsearched(problem, configs, layer)})")
        masks = [best, *(result.mask for result in results if result.mask is not None)]
        by_mask = iter(captured(problem, blocks, masks))
        oracle = next(by_mask)
        mass = [
            exact_mass(problem, configs[i], blocks) if r.mask is None else next(by_mask)
            for i, r in zip(members, results, strict=True)
        ]
        rows = torch.tensor([block.rows for _, block in blocks])
        first = problem.spans[0].row_start
        at = torch.cat([torch.arange(first + block.row, first + block.row + block.rows) for _, block in blocks])
        exact = dense[:, :, at].double()
        (span,) = problem.spans
        dims = problem.q.shape[-1], problem.v.shape[-1], problem.sliding_window, problem.q.element_size()
        for i, result, own in zip(members, results, mass, strict=True):
            error = (result.out[:, :, at].double() - exact).square().sum()
            cost = call_cost(configs[i], [block for _, block in blocks], span.position, span.end, *dims)
            share = None if result.mask is None else overlap(problem, blocks, result.mask, best)
            measured[i] = Measured(own, oracle, rows, float(error), float(exact.square().sum()), share, cost)
    return [measured[i] for i in range(len(configs))]


def summary(settings: str, layer: int | str, keys: int, parts: Sequence[Measured]) -> dict[str, Any]:
    """One row of the report, from what was measured on several prompts (of one layer)."""
    mass, oracle = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("mass", "oracle"))
    weight = torch.cat([part.rows for part in parts]).double()
    weight /= weight.sum()
    cost = total(part.cost for part in parts)
    return {
        "settings": settings,
        "keys": keys,
        "layer": layer,
        "mass": float((mass @ weight).mean()),
        "oracle": float((oracle @ weight).mean()),
        "of_oracle": float((mass @ weight).mean() / (oracle @ weight).mean()),
        "low_5pct": float(mass.flatten().quantile(0.05)),
        "worst_head": float((mass @ weight).min()),
        "error": (sum(part.error for part in parts) / sum(part.norm for part in parts)) ** 0.5,
        "overlap": mean([part.overlap for part in parts]),
        "read": cost.read / cost.visible,
        "keys_read": cost.read / cost.rows,
        "selection_flops": cost.selection / cost.rows,
        "attention_flops": cost.attention / cost.rows,
        "cost": cost.share,
        "bytes": (cost.selection_bytes + cost.attention_bytes) / cost.rows,
        "bytes_share": cost.bytes_share,
    }


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if there is a value missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def over_layers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of all layers: means, but the lowest of what is already a lowest, and of the share of the oracle."""
    row = {name: value if isinstance(value, str) else mean([r[name] for r in rows]) for name, value in rows[0].items()}
    lowest = {name: min(r[name] for r in rows) for name in ("of_oracle", "low_5pct", "worst_head")}
    return row | lowest | {"keys": rows[0]["keys"], "layer": "all"}


def make_text(tokenizer: Any, body: list[int], facts: int, rng: random.Random) -> list[int]:
    """A text as long as `body` (token ids), of which it is made, with facts hidden in it; each is asked for later on.

    Raises:
        ValueError: `body` is too short for so many facts.
    """
    encode = lambda string: tokenizer.encode(string, add_special_tokens=False)  # noqa: E731
    last, *others = hidden = draw_facts(rng, [rng.random() for _ in range(facts)])
    asked = [(rng.uniform(fact.depth, 1), encode(f"{question(fact.name)} {fact.key}.\n")) for fact in others]
    added = sum(len(encode(note(fact.name, fact.key))) for fact in hidden)
    added += sum(len(ids) for _, ids in asked) + len(encode(question(last.name)))
    if added > len(body):
        raise ValueError(f"--facts: got {facts}, allowed: fewer in {len(body)} tokens")
    text = body[: len(body) - added]
    for depth, ids in sorted(asked, reverse=True):  # from the end, so that earlier places stay where they are
        at = round(depth * (len(body) - added))
        text[at:at] = ids
    return make_prompt(tokenizer, text, len(body), hidden, last.name)


def end_to_end(segments: Sequence[AttentionProblem], rows: int) -> AttentionProblem:
    """The last `rows` query rows of the last segment against the keys of all segments, one after the other.

    Every segment keeps its own positions, so all of them look near to these rows: far stronger distractors than a long
    text would hold.
    """
    k, v = (torch.cat([getattr(segment, name) for segment in segments], dim=2) for name in ("k", "v"))
    last, keys = segments[-1], k.shape[2]
    return replace(last, q=last.q[:, :, -rows:], k=k, v=v, spans=(Span(0, 0, keys, 0, rows, keys - rows),))


def layers_of(
    read: Callable[[], list[AttentionProblem]], lengths: Sequence[int], tokens: int, rows: int | None
) -> Iterator[tuple[int, int, AttentionProblem]]:
    """Keys, layer and problem of everything to measure on one prompt; with `rows` (the stress test) of every length."""
    if rows is None:
        for layer, problem in enumerate(read()):
            yield tokens, layer, problem
        return
    segments = []
    for _ in range(max(lengths) // tokens):
        # keep only what is needed of each: the queries of the last rows, and keys and values
        segments.append([replace(p, q=p.q[:, :, -rows:].clone(), v=p.v.contiguous()) for p in read()])
    for length in lengths:
        for layer, parts in enumerate(zip(*segments[-(length // tokens) :], strict=True)):
            yield length, layer, end_to_end(parts, rows)


def main(
    model: Annotated[str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")] = str(CHECKPOINT),
    tokens: Annotated[int, typer.Option(help="Length of each text; with --stress, of each segment.")] = 8192,
    prompts: Annotated[int, typer.Option(min=1, help="Texts to measure on.")] = 2,
    facts: Annotated[int, typer.Option(min=1, max=len(NAMES), help="Pass keys hidden in each text, and asked for.")] = 8,
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["defaults", "paper"],  # noqa: B006
    budget: Annotated[int | None, typer.Option(help="Keys selected per query block; default 256, with --stress 1024.")] = None,
    sink: Annotated[int | None, typer.Option(help="First keys, always read.")] = None,
    window: Annotated[int | None, typer.Option(help="Latest keys, always read.")] = None,
    document: Annotated[Path, typer.Option(help="Plain text to measure on.")] = DOCUMENT,
    budgets: Annotated[str | None, typer.Option(help="Every setting with each of these budgets, like 128,256,512.")] = None,
    stress: Annotated[str | None, typer.Option(help="Put segments end to end to so many keys, like 64K,128K.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="With --stress: query rows, the last ones of the last segment.")] = 1024,
    per_layer: Annotated[bool, typer.Option(help="A row for every layer in the table; JSON always has them.")] = True,
    device: str = "cpu",
    seed: int = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw mass by layer, and error against keys read, into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write JSON to this file as well.")] = None,
) -> None:
    """Compare selections with the block oracle, layer by layer: captured mass, output error, and what they cost."""
    try:
        lengths = sizes(stress) if stress else [tokens]
        several = sizes(budgets) if budgets else [budget or (1024 if stress else 256)]
        configs = {}
        for size in several:
            some = settings_of(settings, tokens=max(lengths), budget=size, sink=sink, window=window)
            configs |= {f"{name}{AT}{size}" if budgets else name: config for name, config in some.items()}
        refuse_extension(configs)
        if any(length % tokens for length in lengths):
            raise ValueError(f"--stress: got {stress}, allowed: multiples of --tokens {tokens}")
        if stress and not DECODE_ROWS < rows <= tokens:
            raise ValueError(f"--rows: got {rows}, allowed: {DECODE_ROWS + 1} to --tokens {tokens}")
        check_output(output)
        text = document.read_text()
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    loaded, tokenizer = load(model, "sdpa")
    loaded.to(device)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    segments = prompts * (max(lengths) // tokens)
    if len(ids) < tokens:
        raise typer.BadParameter(f"--tokens: got {tokens}, allowed: at most the {len(ids)} of {document}")
    if segments * tokens > len(ids):
        report.notes.print(
            f"{document.name} has {len(ids):,} tokens: the {segments} texts of {tokens:,} overlap, with other facts each"
        )
    numbers = iter(range(segments))

    def read() -> list[AttentionProblem]:
        i = next(numbers)
        start = (len(ids) - tokens) * i // max(segments - 1, 1)  # evenly spread over the document
        prompt = make_text(tokenizer, ids[start : start + tokens], facts, random.Random(f"{seed} {i}"))
        return capture(loaded, torch.tensor([prompt], device=device))

    parts: dict[tuple[int, str, int], list[Measured]] = {}
    hard: dict[int, list[Hardness]] = {}
    skipped: dict[int, str] = {}
    with report.progress() as progress:
        task = progress.add_task("layers", total=prompts * len(lengths) * text_config(loaded).num_hidden_layers)
        every = (item for _ in range(prompts) for item in layers_of(read, lengths, tokens, rows if stress else None))
        try:
            for keys, layer, problem in every:
                if reason := unsearched(problem, configs.values(), layer):
                    skipped[layer] = reason
                else:
                    for name, part in zip(configs, measure(problem, list(configs.values()), layer), strict=True):
                        parts.setdefault((keys, name, layer), []).append(part)
                    hyper = [config for config in configs.values() if config.method == "hyper"]
                    if hyper and not stress:
                        hard.setdefault(layer, []).append(hardness(problem, hyper[0]))
                progress.advance(task)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    for layer, reason in skipped.items():
        report.notes.print(f"layer {layer} is left out: {reason}")
    if not parts:
        raise typer.BadParameter(f"nothing to measure in any layer: {next(iter(skipped.values()))}")

    table, layered = [], []
    for keys in lengths:
        for name in configs:
            own = [summary(*key[1:], keys, found) for key, found in parts.items() if key[:2] == (keys, name)]
            if own:
                table.append(over_layers(own))
                layered += [table[-1], *own]
    details = {
        "model": model,
        "document": document.name,
        "prompts": prompts,
        "facts": facts,
        "seed": seed,
        "query_rows": rows if stress else tokens,
        "segment": tokens if stress else None,
        "configs": {name: config.to_dict() for name, config in configs.items()},
    }
    what = f"the last {rows:,} rows against segments of {tokens:,} tokens end to end" if stress else f"{tokens:,} tokens"
    title = f"Share of dense attention captured on searched rows, {what}; FLOPs per query row and head, cost as a share of dense"
    if hard:
        details["hardness"] = hardness_rows(hard)
    publish(title, layered, json, output, details, None if per_layer else table)
    if hard and not json:
        report.show(HARDNESS, details["hardness"], False)
    if plot is not None:
        draw(layered, plot, title)
