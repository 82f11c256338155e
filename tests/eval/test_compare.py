"""The comparison of methods: costs by instrumented runs, hyper's mass and assumptions by brute
force, presets, curves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
from commands import GROUPED, SMALL, refused, run, save_checkpoint
from helpers import assert_near, causal, eager, make_problem, make_qkv, read_mask, small, sparse
from hyper_by_hand import OPTIONS, weights
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig

from hip_hf.attention import attend
from hip_hf.backends.torch.dense_rows import rows_at_once
from hip_hf.cli import compare as compare_command
from hip_hf.cli import fidelity as fidelity_command
from hip_hf.cli import passkey as passkey_command
from hip_hf.cli.presets import every, presets, settings_of
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import mass
from hip_hf.eval.measure.costs import AttentionCost, block_cost, call_cost, prompt_cost
from hip_hf.eval.measure.hyper_assumptions import assumption_rows, measure_assumptions
from hip_hf.geometry import keys_seen, query_blocks
from hip_hf.methods import add_method, hyper
from hip_hf.problem import AttentionProblem
from hip_hf.registry import METHODS


def assert_instrumented(
    cost: AttentionCost, problem: AttentionProblem, config: HiPConfig, hidden: int
) -> None:
    """A run multiplies and reads what `cost` says. It also computes `hidden` products a head: those
    of rows with keys that they may not see."""
    counter = FlopCounterMode(display=False)
    with counter:
        result = attend(problem, config)
    heads = problem.q.shape[1]
    assert counter.get_total_flops() == heads * (cost.selection + cost.attention + hidden)
    assert cost.read / cost.visible == pytest.approx(result.density)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(group_shared=False),
        dict(representative="middle", score="max", beam=1),
        dict(rescore=2, query_stride=4),
        dict(rescore=3, group_shared=False),
        dict(representative="minmax", options={"sample": 8}),
        dict(representative="blend", rescore=1),
        # 4 divides 32: every head has as many votes as alone
        dict(representative="middle", beam=1, query_stride=4),
        dict(coarsest=8),
        dict(vote="sampled", query_stride=5),
        dict(method="streaming"),
        dict(method="staged"),
        dict(method="staged", options=dict(stages=[[64, 128, 4], [16, 64, 2], [4, 16, 1]])),
        dict(method="staged", options=dict(halvings=0)),
        dict(method="quest"),
        dict(method="streaming", options=dict(recent=True)),
    ],
)
@pytest.mark.parametrize("tokens", [96, 413, 1005])
def test_costs_of_one_query_block_are_those_of_an_instrumented_run(
    fields: dict[str, Any], tokens: int, threads: Any
) -> None:
    """Of one block alone, the backend computes no products that another one needs."""
    threads(1)
    config = small(**fields, block_q=32)
    position = tokens // 32 * 32 - 32
    q, k, v = (x[:, :, : position + 32] for x in make_qkv(tokens, dv=8))
    problem = make_problem(q[:, :, -32:], k, v)
    (block,) = query_blocks(config, problem.spans[0], False)
    assert block.rows == 32
    cost = block_cost(config, block, 16, 8)
    assert_instrumented(cost, problem, config, hidden=2 * (16 + 8) * 32 * 31 // 2)


@pytest.mark.parametrize("method", ["streaming", "vertical_slash", "sample", "h2o", "oracle"])
@pytest.mark.parametrize("shared", [True, False])
def test_costs_of_a_call_are_those_of_an_instrumented_run(
    method: str, shared: bool, threads: Any
) -> None:
    """Of methods in which no product serves two query blocks, or all are counted once for the
    call."""
    threads(1)
    config = small(method=method, group_shared=shared)
    problem = make_problem(*make_qkv(413, dv=8))
    blocks = query_blocks(config, problem.spans[0], False)
    cost = call_cost(config, blocks, 0, 413, 16, 8)
    hidden = sum(2 * (16 + 8) * block.rows * (block.rows - 1) // 2 for block in blocks)
    assert_instrumented(cost, problem, config, hidden)


def test_hypers_cost_is_that_of_an_instrumented_run(threads: Any) -> None:
    threads(1)
    config = small(method="hyper", options=OPTIONS)
    problem = make_problem(*make_qkv(413, heads=3, groups=1, dv=8))
    blocks = query_blocks(config, problem.spans[0], False)
    cost = call_cost(config, blocks, 0, 413, 16, 8)
    hidden = 0
    for leaf in hyper.split(0, 413, OPTIONS["min_seq_len"])[0]:
        rows = rows_at_once(1)
        sizes = [min(rows, leaf.end - at) for at in range(leaf.first, leaf.end, rows)]
        hidden += sum(2 * (16 + 8) * n * (n - 1) // 2 for n in sizes)
    assert_instrumented(cost, problem, config, hidden)
    parts = [call_cost(config, some, 0, 413, 16, 8) for some in (blocks, blocks[10:])]
    assert parts[1].rows == 413 - blocks[10].first
    read = [
        hyper.flops(config.method_options(), 0, 413, 16, 8, since)[2] for since in (0, 1, 160, 412)
    ]
    assert read[0] - read[1] == 1  # the first row reads its own key
    assert parts[1].read == read[2]


def test_deltas_cost_is_its_dense_rows() -> None:
    span = make_problem(*make_qkv(413)).spans[0]
    plain, corrected = small(method="streaming"), small(method="streaming", delta=32)
    blocks = query_blocks(plain, span, False)
    costs = [call_cost(config, blocks[5:], 0, 413, 16, 16) for config in (plain, corrected)]
    dense = [p for p in range(0, 413, 32) if p >= blocks[5].first]
    assert costs[1].read - costs[0].read == sum(p + 1 for p in dense)
    assert costs[1].attention - costs[0].attention == sum(p + 1 for p in dense) * 64
    assert costs[1].attention_bytes > costs[0].attention_bytes
    assert costs[1].selection == costs[0].selection


def test_bytes_of_a_query_block() -> None:
    config = small(method="quest", vote="sampled")
    block = query_blocks(config, make_problem(*make_qkv(413)).spans[0], False)[20]
    cost = block_cost(config, block, 16, 8, itemsize=2)
    assert cost.attention_bytes == 2 * (4 + 16 + block.last + 1 - block.window_start) * 24
    assert cost.selection_bytes == 2 * block.num_candidates * 32
    assert cost.dense_bytes == 2 * (block.last + 1) * 24
    assert cost.bytes_share == (cost.attention_bytes + cost.selection_bytes) / cost.dense_bytes


def test_bytes_of_asking_who_needs_the_candidates() -> None:
    """Of 300 keys between sink and window at most 64 are asked, a quarter of `sample`: one of
    eight."""
    config = small(options={"sample": 256})
    block = query_blocks(config, make_problem(*make_qkv(413)).spans[0], False)[20]
    asking, not_asking = (
        block_cost(replace(config, vote=vote), block, 16, 8, itemsize=2)
        for vote in ("need", "sampled")
    )
    assert block.num_candidates * 4 == 300
    assert asking.selection_bytes - not_asking.selection_bytes == 2 * 37 * 16


def test_every_method_has_a_cost_and_a_preset() -> None:
    costs = {
        method: prompt_cost(HiPConfig(method=method, budget=16), 1000)
        for method in METHODS.keys() - {"dense"}
    }
    assert [method for method, cost in costs.items() if cost is None or not cost.attention] == []
    assert {presets()[name]["method"] for name in every()} | {"dense"} == METHODS.keys()
    with pytest.raises(ValueError, match="hyper"):
        block_cost(
            HiPConfig(method="hyper"),
            query_blocks(small(), make_problem(*make_qkv(50)).spans[0], False)[0],
            16,
            16,
        )


def test_mass_of_hyper_is_that_of_what_it_reads_exactly() -> None:
    q, k, v = make_qkv(203, heads=1, groups=2)
    problem = make_problem(q, k, v)
    configs = [small(method="hyper", options=OPTIONS), small()]
    measured = mass.measure_mass(problem, configs)
    own = weights(q, k, small(method="hyper", options={**OPTIONS, "sample_size": 0}))
    p = (
        (q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) / 4)
        .masked_fill(~causal(1, 203, 203), -torch.inf)
        .softmax(-1)
    )
    kept = (p[0] * own).sum(-1)
    blocks = mass.searched_blocks(problem, configs[0])
    want = torch.stack(
        [kept[:, block.row : block.row + block.rows].mean(-1) for _, block in blocks], dim=1
    )
    assert_near(measured[0].mass, want, 1e-5, "mass")
    assert measured[0].overlap is None
    assert measured[1].overlap is not None
    assert torch.equal(measured[1].mass, mass.measure_mass(problem, configs[1:])[0].mass)


def test_hyper_assumptions_by_brute_force() -> None:
    q, k, v = make_qkv(100, heads=1, groups=2)
    config = small(method="hyper", options=dict(min_seq_len=50, block_size=10, sample_size=5))
    got = measure_assumptions(make_problem(q, k, v), config)
    logits = (q[0, :, 50:] @ k[0, :, :50].repeat_interleave(2, 0).transpose(1, 2) / 4).double()
    p = logits.softmax(-1)
    own = (
        weights(
            q, k, small(method="hyper", options=dict(min_seq_len=50, block_size=10, sample_size=0))
        )[:, 50:, :50]
        > 0
    )
    assert (own.sum(-1) == 10).all()
    light = logits.exp().masked_fill(own, 0).sum(-1)
    assert_near(torch.tensor(got["column_norm"]), p.square().sum(1).amax(-1), 1e-6)
    assert_near(torch.tensor(got["column_norm_past_sink"]), p.square().sum(1)[:, 4:].amax(-1), 1e-6)
    assert_near(torch.tensor(got["row_ratio"]), (light.amax(-1) / light.amin(-1)).log10(), 1e-5)
    (row,) = assumption_rows({3: [got, got]})
    assert row["layer"] == 3
    assert row["uniform"] == 1 / 50
    assert row["column_norm"] == pytest.approx(float(max(got["column_norm"])))


def test_hyper_assumptions_tell_easy_from_hard() -> None:
    config = small(method="hyper", options=dict(min_seq_len=50, block_size=10, sample_size=5))
    q, k, v = make_qkv(200, heads=1, groups=1)
    even = measure_assumptions(make_problem(0 * q, k, v), config)
    assert float(even["column_norm"][0]) == pytest.approx(1 / 100)
    assert float(even["row_ratio"][0]) == pytest.approx(0, abs=1e-5)
    k[:, :, 30] = 0
    k[:, :, 30, 0] = 100
    q[..., 0] = 10
    one = measure_assumptions(make_problem(q, k, v), config)
    assert float(one["column_norm"][0]) == pytest.approx(100, rel=1e-3)  # all rows look at one key


@pytest.mark.parametrize("tokens", [2000, 8192, 20000])
@pytest.mark.parametrize("budget", [128, 512])
def test_hyper_is_sized_to_read_as_many_keys(tokens: int, budget: int) -> None:
    config = HiPConfig(budget=budget)
    _, _, read = hyper.flops(hyper.Options(**hyper.sized(config, tokens)), 0, tokens, 1, 1)
    blocks = query_blocks(
        config, make_problem(*(torch.zeros(1, 1, tokens, 1),) * 3).spans[0], False
    )
    want = call_cost(config, blocks, 0, tokens, 1, 1).read
    assert read == pytest.approx(want, rel=0.2)
    assert keys_seen(0, tokens - 1, None) > read


class Even:
    """It picks blocks at even distances: a method as a user would add it."""

    def __init__(self, config: HiPConfig) -> None:
        self.config, self.budget = config, config.budget // config.block_k

    def make_pyramid(self, dtype: torch.dtype) -> None:
        return None

    def bind(self, q: torch.Tensor, *rest: Any) -> Even:
        self.masks_per_kv_head = 1 if self.config.group_shared else q.shape[1]
        return self

    def select(self, heads: slice, blocks: list[Any]) -> torch.Tensor:
        ids = [
            torch.arange(self.budget) * block.num_candidates // self.budget + block.low
            for block in blocks
        ]
        return torch.stack(ids).expand(heads.stop - heads.start, self.masks_per_kv_head, -1, -1)

    def cost(self, block: Any, dim: int) -> tuple[int, int]:
        return 7 * dim, dim


def test_a_method_of_ones_own() -> None:
    try:
        add_method("even", Even)
        assert every()[-1] == "even"
        assert settings_of(["even"])["even"].method == "even"
        config, tensors = small(method="even"), make_qkv(203)
        (measured,) = mass.measure_mass(make_problem(*tensors), [config])
        assert measured.cost.selection == 7 * 16 * measured.mass.shape[1]
        got = sparse(*tensors, config)
        assert_near(got.out, eager(*tensors, read_mask(got.mask, config, *tensors[:2]))[0])
        corrected = attend(make_problem(*tensors), small(method="even", delta=1)).out
        assert_near(corrected, eager(*tensors, causal(1, 203, 203))[0])
        with pytest.raises(ValueError, match="not taken"):
            add_method("even", Even)
    finally:
        METHODS.pop("even", None)


def test_own_settings(tmp_path: Path) -> None:
    """Those of the checkpoint's config, in a wrapper's language part as well; nothing else touches
    them."""
    config = LlamaConfig(**GROUPED)
    config.save_pretrained(tmp_path)
    found = settings_of(["own"], checkpoint=str(tmp_path), budget=128, window=64)
    assert found == {"own": HiPConfig()}
    config.hip = {"budget": 256, "layers": {"1": {"budget": 64}}, "dense_layers": 1}
    for saved in (config, LlavaConfig(text_config=config)):
        saved.save_pretrained(tmp_path)
        (own,) = settings_of(["own"], checkpoint=str(tmp_path), budget=128).values()
        assert own == HiPConfig(budget=256, layers={1: {"budget": 64}}, dense_layers=1)
    with pytest.raises(ValueError, match="no model here"):
        settings_of(["own"])
    assert "cannot load" in refused(
        passkey_command.main, str(tmp_path / "nowhere"), "--settings", "own"
    )


def test_own_settings_have_one_row(tmp_path: Path) -> None:
    """Beside the others, at any number of budgets; and it is these settings that the model attends
    by."""
    model, text = save_checkpoint(tmp_path)
    own = {**SMALL, "dense_layers": 1, "dense_below": 0, "dense_tail": 0}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hip": own}))
    arguments = [
        model,
        "--document",
        text,
        "--tokens",
        "256",
        "--prompts",
        "1",
        "--measures",
        "perplexity",
        "--budgets",
        "32,64",
    ]
    sizes = json.dumps({name: value for name, value in SMALL.items() if name != "budget"})
    report = run(compare_command.main, *arguments, "--settings", sizes, "--settings", "own")
    assert [row["settings"] for row in report["rows"]] == [f"{sizes} @ 32", "own", f"{sizes} @ 64"]
    assert report["configs"]["own"] == HiPConfig(**own).to_dict()
    asked = ["--lengths", "200", "--depths", "1", "--samples", "1", "--settings", "own"]
    (row, *_) = run(passkey_command.main, model, "--document", text, *asked)["rows"]
    assert row["path_prefill"] == "1 dense (dense layer), 1 sparse"


def test_all_presets() -> None:
    settings = settings_of(["dense", "all"], tokens=1000, budget=128)
    assert list(settings) == ["dense", *every()]
    assert "quality" in settings
    assert "own" not in settings
    assert (
        settings["quality"].beam,
        settings["quality"].query_stride,
        settings["quality"].decode_refresh,
    ) == (16, 1, 1)
    assert settings["hyper"].options["min_seq_len"] < 1000
    assert all(config.budget == 128 for config in settings.values())


def test_command_with_several_budgets(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    sizes = {name: value for name, value in SMALL.items() if name != "budget"}
    names = [json.dumps({**sizes, "method": method}) for method in ("quest", "streaming")]
    names.append(
        json.dumps(
            {
                **sizes,
                "method": "hyper",
                "options": {"min_seq_len": 64, "block_size": 16, "sample_size": 16},
            }
        )
    )
    picture = tmp_path / "curves.png"
    arguments = [model, "--document", text]
    arguments += split("--tokens 512 --facts 2 --prompts 1 --budgets 32,64")
    report = run(
        fidelity_command.main,
        *arguments,
        *[x for name in names for x in ("--settings", name)],
        "--plot",
        str(picture),
    )
    rows = {row["settings"]: row for row in report["rows"] if row["layer"] == "all"}
    assert list(rows) == [f"{name} @ {budget}" for budget in (32, 64) for name in names]
    quest, streaming, hyper_ = (
        [rows[f"{name} @ {budget}"] for budget in (32, 64)] for name in names
    )
    assert quest[0]["keys_read"] < quest[1]["keys_read"]
    assert quest[0]["bytes"] > 0
    assert streaming[0]["overlap"] == 0
    assert hyper_[0]["overlap"] is None
    assert all(0 < row["mass"] < 1 and math.isfinite(row["error"]) for row in rows.values())
    assert [row["layer"] for row in report["hyper_assumptions"]] == [0, 1]
    assert picture.read_bytes()[:4] == b"\x89PNG"
