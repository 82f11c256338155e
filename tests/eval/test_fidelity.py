"""`hip-hf fidelity`: captured mass by brute force, the oracle, costs of a prompt, captured
problems, the report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
from commands import SMALL, TEXT, byte_tokenizer, invoke, refused, run, save_checkpoint
from families import FAMILIES, VOCAB, make_model
from helpers import assert_near, causal, eager, make_problem, make_qkv, read_mask, small

from hip_hf.attention import attend
from hip_hf.cli import fidelity as fidelity_command
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import fidelity, mass
from hip_hf.eval.measure.capture import DENSE, capture
from hip_hf.eval.measure.costs import block_cost, total_cost
from hip_hf.geometry import query_blocks
from hip_hf.methods.base import selects
from hip_hf.problem import AttentionProblem
from hip_hf.registry import METHODS

VARIANTS = [
    {},
    {"group_shared": False},
    {"representative": "middle", "score": "max", "beam": 1},
    {"rescore": 2, "query_stride": 4},
    *({"method": method} for method in METHODS if selects(method) and method != "hip"),
]


def brute_mass(problem: AttentionProblem, config: HiPConfig, blocks: Any) -> torch.Tensor:
    """Mass `[Hq, blocks]` in float64, from the whole matrix of probabilities and the keys that the
    call must have read."""
    q, k = problem.q.double(), problem.k.double().repeat_interleave(problem.groups, 1)
    logits = q @ k.transpose(2, 3) * problem.scale
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    sliding = problem.sliding_window
    seen = causal(1, q.shape[2], k.shape[2], sliding=sliding)
    p = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)
    mask = attend(problem, config, need_mask=True).mask
    assert mask is not None
    kept = (p * read_mask(mask, config, problem.q, problem.k, sliding=sliding)).sum(-1)[
        0
    ]  # [Hq, Tq]
    return torch.stack(
        [kept[:, block.row : block.row + block.rows].mean(-1) for _, block in blocks], dim=1
    )


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize(("tokens", "rows"), [(200, 200), (203, 203), (203, 60)])
def test_mass_and_error_by_brute_force(fields: dict[str, Any], tokens: int, rows: int) -> None:
    problem = make_problem(*make_qkv(tokens, rows, dv=8))
    config = small(**fields)
    (measured,) = mass.measure_mass(problem, [config])
    blocks = mass.searched_blocks(problem, config)
    assert measured.mass.shape == (4, len(blocks))
    assert_near(measured.mass, brute_mass(problem, config, blocks), 1e-6, "mass")
    first = blocks[0][1].row
    out, want = (
        attend(problem, config).out[:, :, first:].double(),
        attend(problem, DENSE).out[:, :, first:].double(),
    )
    assert (measured.error / measured.norm) ** 0.5 == pytest.approx(
        float((out - want).norm() / want.norm()), rel=1e-4
    )


def test_mass_with_softcap_and_sliding_window() -> None:
    problem = make_problem(*make_qkv(300), softcap=2.0, sliding_window=150)
    config = small()
    (measured,) = mass.measure_mass(problem, [config])
    assert_near(
        measured.mass,
        brute_mass(problem, config, mass.searched_blocks(problem, config)),
        1e-6,
        "mass",
    )


def test_everything_read() -> None:
    problem = make_problem(*make_qkv(203))
    config = small(budget=256)
    result = attend(problem, config, need_mask=True)
    assert result.path == "sparse"
    blocks = list(enumerate(query_blocks(config, problem.spans[0], False)))
    assert_near(
        mass.captured_mass(problem, blocks, [result.mask]),
        torch.ones(1, 4, len(blocks)),
        1e-6,
        "mass",
    )
    assert_near(result.out, attend(problem, DENSE).out, 1e-5)
    assert "covers" in mass.unsearched(problem, [config], None)
    with pytest.raises(ValueError, match="covers"):
        mass.measure_mass(problem, [config])
    assert "dense" in mass.unsearched(problem, [HiPConfig(method="dense")], None)


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_beats_the_oracle(shared: bool) -> None:
    q, k, v = make_qkv(400, needles={300: 100, 333: 50, 390: 200})
    problem = make_problem(q, k, v)
    configs = [small(**{**fields, "group_shared": shared}) for fields in VARIANTS]
    for config, measured in zip(configs, mass.measure_mass(problem, configs), strict=True):
        # a shared selection is best for its group, not for each head
        own, best = (
            x.unflatten(0, (2, 2)).mean(1) if shared else x
            for x in (measured.mass, measured.oracle)
        )
        assert (own <= best + 1e-6).all()
        assert 0 <= measured.overlap <= 1
        if config.method == "oracle":
            assert_near(measured.mass, measured.oracle, 0.0, "mass")
            assert measured.overlap == 1
        if config.method == "streaming":
            assert measured.overlap == 0


def test_settings_of_different_geometry_are_measured_apart() -> None:
    problem = make_problem(*make_qkv(300))
    configs = [small(), small(block_k=8), small(budget=32), small(sink=16)]
    together = mass.measure_mass(problem, configs)
    for config, measured in zip(configs, together, strict=True):
        (alone,) = mass.measure_mass(problem, [config])
        assert torch.equal(alone.mass, measured.mass)
        assert torch.equal(alone.oracle, measured.oracle)


def test_costs_of_a_prompt() -> None:
    problem = make_problem(*make_qkv(500))
    config = small()
    cost = total_cost(
        block_cost(config, block, 16, 16) for block in query_blocks(config, problem.spans[0], False)
    )
    assert (cost.rows, cost.visible, cost.dense) == (500, 500 * 501 // 2, 500 * 501 // 2 * 64)
    assert cost.read / cost.visible == pytest.approx(attend(problem, config).density)
    assert cost.attention == cost.read * 64
    assert cost.share == (cost.attention + cost.selection) / cost.dense


@pytest.mark.parametrize("family", FAMILIES)
def test_capture(family: str) -> None:
    """What is captured gives, with plain attention, what the model's own attention computes."""
    model = make_model(family, "eager")
    ids = torch.randint(2, VOCAB - 1, (2, 60))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    problems = capture(model, ids, mask)
    assert model.config._attn_implementation == "eager"
    assert len(problems) == len(inputs) == 2
    for problem, want in zip(problems, inputs, strict=True):
        seen = causal(2, 60, 60, [0, 7], sliding=problem.sliding_window)
        out, _ = eager(
            problem.q, problem.k, problem.v, seen, problem.scale, problem.softcap, problem.sinks
        )
        want = want.unflatten(-1, (4, -1)).transpose(1, 2)
        assert_near(out[0], want[0], 1e-5)
        assert_near(out[1, :, 7:], want[1, :, 7:], 1e-5)


def test_capture_restores_after_an_error() -> None:
    model = make_model("llama", "sdpa")
    ids = torch.ones(1, 40, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 10:12] = 0  # a hole, which spans cannot say
    with pytest.raises(ValueError, match="not causal"):
        capture(model, ids, mask)
    assert model.config._attn_implementation == "sdpa"
    assert len(capture(model, ids)) == 2


def test_end_to_end() -> None:
    segments = [make_problem(*make_qkv(100)) for _ in range(3)]
    problem = fidelity.end_to_end(segments, 20)
    want, _ = eager(segments[-1].q[:, :, -20:], problem.k, problem.v, causal(1, 20, 300))
    assert_near(attend(problem, DENSE).out, want)
    assert torch.equal(problem.k[:, :, 100:200], segments[1].k)


def test_text_asks_for_what_it_has_hidden() -> None:
    tokenizer = byte_tokenizer()
    words = tokenizer.decode(
        fidelity.make_text(tokenizer, tokenizer.encode(TEXT, verbose=False), 4, random.Random(1))
    )
    assert len(words) == len(TEXT)
    assert words.count("Remember it.") == 4
    for piece in words.split("What is the pass key of ")[1:]:
        name = piece.partition("?")[0]
        assert words.index(f"The pass key of {name} is") < words.index(
            f"What is the pass key of {name}"
        )
    assert words.count("What is the pass key of") == 4
    with pytest.raises(ValueError, match="facts"):
        fidelity.make_text(tokenizer, [5] * 100, 4, random.Random(1))


def test_command(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    settings = json.dumps(SMALL)
    oracle = json.dumps({**SMALL, "method": "oracle"})
    arguments = [model, "--document", text, *split("--tokens 512 --facts 2")]
    arguments += ["--settings", settings, "--settings", oracle]
    saved = tmp_path / "rows.json"
    printed = run(fidelity_command.main, *arguments, "--no-per-layer", "--output", str(saved))
    rows = printed["rows"]
    assert json.loads(saved.read_text())["rows"] == rows
    assert [(row["settings"], row["layer"]) for row in rows] == [
        (s, n) for s in (settings, oracle) for n in ("all", 0, 1)
    ]
    assert all(0 < row["mass"] <= row["oracle"] + 1e-6 <= 1 for row in rows)
    assert all(row["of_oracle"] == pytest.approx(row["mass"] / row["oracle"]) for row in rows)
    for summary, *layers in (rows[:3], rows[3:]):
        assert summary["mass"] == pytest.approx((layers[0]["mass"] + layers[1]["mass"]) / 2)
        assert summary["oracle"] == pytest.approx((layers[0]["oracle"] + layers[1]["oracle"]) / 2)
        assert summary["worst_layer"] == min(layer["of_oracle"] for layer in layers)
        assert [layer["worst_layer"] for layer in layers] == [
            layer["of_oracle"] for layer in layers
        ]
    assert [row["overlap"] for row in rows[3:]] == [1, 1, 1]
    assert rows[0]["read"] < 0.5
    # the table may leave the layers out, the file may not
    given = (*arguments, "--no-per-layer", "--output", saved)
    table = invoke(fidelity_command.main, *given, COLUMNS="200").stdout
    assert len([line for line in table.splitlines() if "512" in line and "all" in line]) == 2
    assert json.loads(saved.read_text())["rows"] == rows


def test_command_stress(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    arguments = [model, "--document", text]
    arguments += split("--tokens 512 --facts 2 --prompts 1 --stress 1K,2K --rows 64")
    rows = run(fidelity_command.main, *arguments, "--settings", json.dumps(SMALL))["rows"]
    assert [(row["keys"], row["layer"]) for row in rows] == [
        (keys, n) for keys in (1024, 2048) for n in ("all", 0, 1)
    ]
    assert rows[0]["read"] > rows[3]["read"]


def test_refusals(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    base = [model, "--document", text, "--tokens", "512", "--facts", "1"]
    assert "multiples" in refused(fidelity_command.main, *base, "--stress", "1000")
    assert "--rows" in refused(fidelity_command.main, *base, "--stress", "1K", "--rows", "8")
    assert "covers" in refused(fidelity_command.main, *base, "--budget", "1024")
    assert "dense" in refused(fidelity_command.main, *base, "--settings", "dense")
    assert "extend" in refused(
        fidelity_command.main, *base, "--settings", '{"extend": "streaming"}'
    )
    assert "--facts" in refused(fidelity_command.main, *base, "--facts", "8", "--budget", "64")
    assert "--tokens" in refused(
        fidelity_command.main, model, "--document", text, "--tokens", "100000"
    )


def test_all_layers_together() -> None:
    """The share of the oracle is that of the means, which a layer with little mass hardly moves;
    the worst layer is beside it."""
    layers = []
    for layer, (kept, best) in enumerate([(0.9, 1.0), (0.1, 0.2)]):
        shares = {"of_oracle": kept / best, "worst_layer": kept / best}
        own = {"settings": "x", "keys": 8, "layer": layer, "mass": kept, "oracle": best}
        layers.append({**own, **shares, "low_5pct": kept, "worst_head": kept})
    row = fidelity.over_layers(layers)
    assert row["of_oracle"] == pytest.approx(1.0 / 1.2)
    assert (row["worst_layer"], row["worst_head"], row["layer"]) == (pytest.approx(0.5), 0.1, "all")
