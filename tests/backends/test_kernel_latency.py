"""`hip-hf latency --device cuda` on tiny calls: everything but the device's clock and graphs, and
on a GPU those as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import roofline
import torch
from helpers import assert_near, small
from interpreter import DEVICE

pytest.importorskip("typer")
pytest.importorskip("rich")

from commands import invoke
from triton.runtime.interpreter import GridExecutor

from hip_hf.backends.triton.attention import prefill
from hip_hf.backends.triton.attention.backward import query_gradient_arguments
from hip_hf.backends.triton.attention.decode import splits_for
from hip_hf.backends.triton.common.arguments import Logits, Operands, Part, dense_reads
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.backends.triton.common.tuning import processors, target_of
from hip_hf.cli import latency as latency_command
from hip_hf.cli.presets import sizes
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import gpu_latency, kernel_costs, latency
from hip_hf.eval.measure.gpu_latency import Bench, CapturedSteps, DeviceClock, gpu_latency_rows
from hip_hf.eval.measure.gpu_shapes import NO_COST, KernelCost, Shape
from hip_hf.eval.measure.latency import TimingPlan, ours
from hip_hf.eval.reporting.resumable import Resumable
from hip_hf.geometry import Span
from hip_hf.methods import hyper
from hip_hf.state import DecodeState

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

LENGTH = 72
COLUMNS = (
    "phase dtype batch length settings hip_ms sdpa_ms sdpa times_faster tokens_per_s tflops "
    "gb_per_s over_floor selecting peak_gb sdpa_peak_gb path reason runs"
)


def kernels(**fields: Any) -> HiPConfig:
    return small(backend="triton", **{"decode_refresh": 2, **fields})


def plan(**fields: Any) -> TimingPlan:
    shape = dict(
        heads=2, kv_heads=1, head_dim=16, repeats=1, device=torch.device(DEVICE), dtypes=["fp16"]
    )
    return TimingPlan(**{**shape, "settings": {"small": kernels()}, **fields})


def by_phase(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["phase"]: row for row in rows}


def test_rows_of_every_phase() -> None:
    rows, refused = gpu_latency_rows(
        plan(), ("prefill", "decode", "backward", "selection"), [LENGTH]
    )
    found = by_phase(rows)
    phases = [
        "prefill",
        "selection",
        "decode amortised",
        "decode refreshed",
        "decode selection",
        "backward",
    ]
    assert list(found) == phases
    assert len(rows) == len(phases)
    for phase, row in found.items():
        assert " ".join(row) == COLUMNS
        assert (row["path"], row["reason"]) == ("sparse", "")
        assert row["hip_ms"] > 0
        tokens = 1 if phase.startswith("decode") else LENGTH
        assert row["tokens_per_s"] == pytest.approx(1000 * tokens / row["hip_ms"])
        if "selection" in phase:
            assert (row["sdpa_ms"], row["times_faster"], row["selecting"]) == (None, None, 1.0)
        else:
            assert row["sdpa"] in ("flash", "cudnn")
            assert row["times_faster"] == pytest.approx(row["sdpa_ms"] / row["hip_ms"])
        assert (row["peak_gb"] is None) == (DEVICE == "cpu")
    shape, config = Shape(2, 1, 16, 2), kernels()
    cost = kernel_costs.call_total(kernel_costs.prompt_kernels(LENGTH, config, shape))
    assert found["prefill"]["tflops"] == pytest.approx(
        cost.flops / found["prefill"]["hip_ms"] / 1e9
    )
    assert found["prefill"]["gb_per_s"] == pytest.approx(
        cost.bytes / found["prefill"]["hip_ms"] / 1e6
    )
    assert found["prefill"]["selecting"] == pytest.approx(
        found["selection"]["hip_ms"] / found["prefill"]["hip_ms"]
    )
    chosen = found["decode selection"]["hip_ms"]
    assert found["decode refreshed"]["selecting"] == pytest.approx(
        chosen / found["decode refreshed"]["hip_ms"]
    )
    assert found["decode amortised"]["selecting"] == pytest.approx(
        chosen / 2 / found["decode amortised"]["hip_ms"]
    )
    if DEVICE == "cpu":  # where cuDNN is not
        assert any(line.startswith("prefill, fp16: cudnn: ") for line in refused)


def test_decode_of_a_batch_in_graphs_and_launched() -> None:
    """Every row of the batch counts, in tokens and in the model's work."""
    one, three = (
        by_phase(gpu_latency_rows(plan(batch=batch), ("decode", "launched"), [LENGTH])[0])
        for batch in (1, 3)
    )
    phases = ["decode amortised", "decode refreshed"]
    assert list(three) == [*phases, "decode selection", *(f"{phase}, launched" for phase in phases)]
    for phase, row in three.items():
        assert (row["batch"], row["path"]) == (3, "sparse")
        assert row["tokens_per_s"] == pytest.approx(3000 / row["hip_ms"])
        assert row["tflops"] * row["hip_ms"] == pytest.approx(
            3 * one[phase]["tflops"] * one[phase]["hip_ms"]
        )
        assert (row["sdpa_ms"] is None) == (phase == "decode selection")


def test_backends_that_are_not_asked_for_are_no_baselines() -> None:
    (row,), refused = gpu_latency_rows(plan(), ("prefill",), [LENGTH], backends=())
    assert (row["sdpa"], row["sdpa_ms"], refused) == ("-", None, [])


def test_a_baseline_that_takes_the_probe_and_not_the_call_drops_out() -> None:
    bench = Bench(plan(), "fp16", DeviceClock(torch.device(DEVICE)))

    def full() -> None:
        raise torch.OutOfMemoryError("full\nof it")

    dense = {"flash": bench.call(full), "cudnn": bench.call(lambda: None)}
    ours = bench.call(lambda: None)
    bench.time("prefill", dense, [ours])
    assert list(dense) == ["cudnn"]
    assert [len(call.seconds) for call in (dense["cudnn"], ours)] == [1, 1]
    assert list(bench.refused) == ["prefill, fp16: flash: full"]


def test_finished_cells_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run goes on where it stopped, and says the same of what was refused."""
    output = tmp_path / "latency.json"
    asked = plan(), ("decode",), [LENGTH, LENGTH + 8]
    decode, done = Bench.decode, []

    def stops(self: Bench, length: int) -> list[dict[str, Any]]:
        if length in done or (length > LENGTH and not done[1:]):
            done.append(length)
            raise KeyboardInterrupt
        done.append(length)
        self.refused[f"at {length}"] = None
        return decode(self, length)

    monkeypatch.setattr(Bench, "decode", stops)
    with pytest.raises(KeyboardInterrupt):
        gpu_latency_rows(*asked, kept=Resumable(output, {}))
    assert done == [LENGTH, LENGTH + 8]
    done[:] = [0, 0]
    kept = Resumable(output, {})
    measured = next(iter(kept.done.values()))
    rows, refused = gpu_latency_rows(*asked, kept=kept)
    assert done == [0, 0, LENGTH + 8]
    assert rows[: len(measured["rows"])] == measured["rows"]
    assert {row["length"] for row in rows} == {LENGTH, LENGTH + 8}
    assert {f"at {LENGTH}", f"at {LENGTH + 8}"} <= set(refused)


def test_short_contexts_are_measured_as_what_they_are() -> None:
    rows, _ = gpu_latency_rows(
        plan(settings={"far": kernels(dense_below=10**6)}),
        ("prefill", "decode", "selection"),
        [LENGTH],
    )
    found = by_phase(rows)
    assert list(found) == ["prefill", "decode amortised", "decode refreshed"]  # nothing selects
    for row in rows:
        assert (row["path"], row["selecting"]) == ("dense", None)
        assert "dense_below" in row["reason"]


def test_a_method_without_a_model_has_no_figures_from_it() -> None:
    rows, _ = gpu_latency_rows(
        plan(settings={"local": kernels(method="streaming")}), ("prefill", "decode"), [LENGTH]
    )
    assert {row["phase"] for row in rows} == {"prefill", "decode amortised", "decode refreshed"}
    assert all(
        (row["path"], row["tflops"], row["selecting"]) == ("sparse", None, None) for row in rows
    )


def test_the_faster_baseline_is_the_one_that_counts() -> None:
    bench = Bench(plan(), "fp16", DeviceClock(torch.device(DEVICE)))
    calls = {name: bench.call(lambda: None) for name in ("ours", "flash", "cudnn")}
    for name, seconds in (("ours", [2.0]), ("flash", [6.0, 9.0, 7.0]), ("cudnn", [8.0, 5.0, 5.5])):
        calls[name].seconds = seconds
    dense = {name: calls[name] for name in ("flash", "cudnn")}
    measured = gpu_latency.MeasuredRuns(
        "prefill", 4096, {"small": calls["ours"]}, dense, {"small": 1}, tokens=4096
    )
    (row,) = bench.rows(measured, {"small": kernels()}, {"small": 0.5})
    assert (row["sdpa"], row["sdpa_ms"], row["times_faster"], row["selecting"]) == (
        "cudnn",
        5500.0,
        2.75,
        0.25,
    )


def test_a_backend_that_refuses_is_named() -> None:
    bench = Bench(plan(), "fp16", DeviceClock(torch.device(DEVICE)))

    def probe() -> None:
        raise RuntimeError("No available kernel.\nMore of it.")

    assert bench.baselines("prefill", probe, probe) == {}
    assert list(bench.refused) == [
        f"prefill, fp16: {name}: No available kernel." for name in ("flash", "cudnn")
    ]


@pytest.mark.parametrize(("refresh", "batch"), [(1, 1), (2, 1), (2, 3)])
def test_steps_give_what_decode_gives_each_time_they_run(refresh: int, batch: int) -> None:
    """The steps of a run are those of generation after a prompt; a second run repeats the first,
    also after others with the same state."""
    length, count, config = 100, 5, kernels(decode_refresh=refresh)
    q, k, v = plan(batch=batch).random("fp32", length + count, count)
    state = DecodeState()
    before = torch.zeros(batch, q.shape[1], length, q.shape[3], device=q.device)
    ours(before, k[:, :, :length], v[:, :, :length], config, state)
    for step in range(count):
        end = length + step + 1
        want = ours(q[:, :, step : step + 1], k[:, :, :end], v[:, :, :end], config, state)
        assert (want.path, want.reason) == ("sparse", "")
    steps = CapturedSteps((q, k, v), length, count, config)
    others = CapturedSteps(
        (q, k, v), length, count, replace(config, decode_refresh=4), attend=False, state=steps.state
    )
    for between in (lambda: None, others):
        between()
        assert_near(steps().cpu(), want.out.cpu(), 1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    result = invoke(latency_command.main, "--device", "cuda")
    assert result.exit_code == 2
    assert "torch sees no GPU" in " ".join(result.output.replace("│", " ").split())


def test_the_command_prints_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line on, with the machine's device in place of the one asked for."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "device", lambda name: latency.CPU)
        monkeypatch.setattr(
            latency.report,
            "machine",
            lambda: {"cpu": "a CPU", "threads": 1, "gpu": None, "torch": "2"},
        )
    shape = split(f"--heads 4 --kv-heads 2 --head-dim 16 --repeats 1 --lengths {LENGTH}")
    fields = {
        key: value
        for key, value in kernels().to_dict().items()
        if value != HiPConfig().to_dict()[key]
    }
    result = invoke(
        latency_command.main,
        "--device",
        "cuda",
        "--phases",
        "prefill,selection",
        *shape,
        "--settings",
        json.dumps(fields),
        "--json",
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["phase"] for row in document["rows"]] == ["prefill", "selection"]
    assert document["rows"][0]["dtype"] == "bf16"
    assert "4 query heads, 2 key heads, D=16" in document["title"]
    wrong = invoke(latency_command.main, "--device", "cuda", "--settings", '{"method": "quest"}')
    assert wrong.exit_code == 2
    assert "quest" in wrong.output


@pytest.mark.parametrize(
    "arguments",
    [("--device", "tpu"), ("--phases", "backward"), ("--lengths", "1G"), ("--lengths", "M")],
)
def test_bad_arguments_are_named(arguments: tuple[str, str]) -> None:
    result = invoke(latency_command.main, *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_lengths() -> None:
    assert sizes("8K, 1M,300") == [8192, 2**20, 300]


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize(
    ("dim", "dtype"), [(128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)]
)
def test_the_model_counts_the_tiles_that_are_launched(
    group: int, dim: int, dtype: torch.dtype
) -> None:
    """Each tile of a query block gathers the block's keys: as many as programs of a head and query
    block, forward and for dQ. Few rows are split as they would be."""
    q, k = (torch.empty(1, heads, 128, dim, dtype=dtype, device=DEVICE) for heads in (2 * group, 2))
    kv, sequences = KeyValues(k, k), Sequences.of([Span(0, 0, 128, 0, 128, 0)], q.device)
    shape = Shape(2 * group, 2, dim, dtype.itemsize, target_of(q), processors(q), sequences=3)
    for call in ((100, 1, 1), (1604, 1, 1), (1 << 20, 1, 1), (1 << 20, 64, 64), (1 << 20, 5, 64)):
        assert shape.splits(*call) == splits_for(q, 2, 3, *call)
    x = Operands(q, kv, Logits(1.0), q, q.new_empty(q.shape[:3], dtype=torch.float32))
    for block_q in (64, 32):
        part = Part(sequences, dense_reads(block_q))
        (tiles, lists, _), _ = prefill.call_arguments(x, part, shape.tile("prefill"))
        assert (tiles, lists) == (
            sequences.blocks(block_q) * shape.row_tiles("prefill", block_q, 2),
            2,
        )
        of_queries = (q, None, q, x.lse, shape.tile("backward queries"))
        (tiles, lists, _), _ = query_gradient_arguments(x, part, *of_queries)
        assert (tiles, lists) == (
            sequences.blocks(block_q) * shape.row_tiles("backward queries", block_q, 2),
            2,
        )


Launched = list[tuple[str, tuple[int, ...], dict[str, Any]]]


def launched(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Launched:
    """Names, grids and named arguments of the kernels that `run` launches."""
    found: Launched = []
    execute = GridExecutor.__call__

    def noted(self: GridExecutor, *args: Any, **named: Any) -> Any:
        found.append((self.fn.__name__, self.grid, named))
        return execute(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", noted)
        run()
    return found


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are read from the interpreter")
def test_the_model_has_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of call: the kernels, who shares a search or a row's keys, and how many rows
    are merged."""
    config, shape = kernels(rescore=2, dense_tail=16), Shape(4, 2, 16, 4)
    options = dict(lsh_num_projs=4, block_size=16, sample_size=16, min_seq_len=64)
    fields = {
        "prefill": {},
        "hyper": dict(method="hyper", options=options),
        "delta": dict(delta=32),
    }
    q, k, v = plan(heads=4, kv_heads=2).random("fp32", 160, 160)
    found = {
        name: launched(monkeypatch, partial(ours, q, k, v, replace(config, **own)))
        for name, own in fields.items()
    }
    leaves, state = [x.clone().requires_grad_() for x in (q, k, v)], DecodeState()
    out = ours(*leaves, config).out.sum()
    found["backward"] = launched(monkeypatch, out.backward)
    ours(q[:, :, :159], k[:, :, :159], v[:, :, :159], config, state)
    found["decode"] = launched(monkeypatch, partial(ours, q[:, :, 159:], k, v, config, state))
    costs = {
        name: cost
        for name, (cost,) in roofline.kernels(
            160, config, shape, hyper.Options(**options), 32
        ).items()
    }
    assert {
        f"{name}: {kernel}" for name, calls in found.items() for kernel, _, _ in calls
    } == costs.keys()
    assert NO_COST not in costs.values()
    for call, block_q in (("prefill", 16), ("decode", 1)):
        (search,) = (named for kernel, _, named in found[call] if kernel == "select_kernel")
        expected = kernel_costs.launch(160, config, shape, block_q)
        assert {name: search[name] for name in expected} == expected
    for call in ("prefill", "hyper", "delta", "decode"):
        ((rows, heads, _), named) = next(x[1:] for x in found[call] if x[0] == "combine_kernel")
        assert costs[f"{call}: combine_kernel"] == KernelCost(
            0, rows * heads * (named["SPLITS"] * 17 * 4 + 16 * 4)
        )
    # what is called is the sum of its kernels
    called, bench = (
        roofline.calls(160, config, shape),
        Bench(plan(heads=4, kv_heads=2), "fp32", DeviceClock(torch.device(DEVICE))),
    )
    for call, name in {
        "prefill": "prefill",
        "backward": "backward",
        "decode": "decode, amortised",
    }.items():
        own = sum(
            (cost for kernel, cost in costs.items() if kernel.startswith(f"{call}: ")), NO_COST
        )
        assert (
            sum(called[name], NO_COST)
            == own
            == bench.cost(roofline.CALLS[name][0], 160, config, "sparse")
        )


def test_the_model_adds_up() -> None:
    """By hand, for a small prompt: 4 query heads on 2 key heads of 16 numbers in 2 bytes, query
    blocks of 16 rows."""
    shape = Shape(4, 2, 16, 2)
    assert shape.row_tiles("prefill", 16, 2) == 1
    config = small(
        dense_tail=0, options={"sample": 256}
    )  # sink 4, budget 16, window 16, and the block's own 16
    one = kernel_costs.prompt_attention(320, config, shape)
    assert one.flops == 4 * 320 * 4 * 52 * 16
    assert one.bytes == 20 * 2 * 52 * 2 * 16 * 2 + 2 * 320 * 4 * 16 * 2
    # four programs share the 320 keys of the tail: each reads q, and leaves 17 numbers in fp32 of
    # each row and head
    with_tail = kernel_costs.prompt_kernels(320, small(dense_tail=64), shape)
    assert with_tail["attend_kernel"].flops == 4 * 4 * 16 * (256 * 52 + 64 * 320)
    assert with_tail[
        "attend_kernel"
    ].bytes == 16 * 2 * 52 * 64 + 2 * 320 * 64 + 2 * 256 * 128 + 64 * 4 * (128 + 4 * 17 * 4)
    assert with_tail["combine_kernel"] == KernelCost(0, 64 * (4 * 4 * 17 * 4 + 128))
    # by need, of half of the rows with 36 keys that are always read and a sample of 64, which is a
    # quarter of the largest, as the prompt is short: a quarter of all rows are copied; sampled rows
    # are only read
    need, vote = kernel_costs.need(320, config, shape), kernel_costs.vote(320, config, shape)
    assert need == KernelCost(
        320 * 4 * 100 * 16, 20 * 2 * 100 * 32 + 320 * 128 / 2 + 320 * 4 * 4 * 2 / 2
    )
    assert vote == KernelCost(0, 320 * 128 * 2 / 4 + 320 * 4 * 4 * (1 / 2 + 2 / 4))
    # with `query_stride=2` all that are asked vote, and are read where they lie
    unranked = small(query_stride=2)
    assert kernel_costs.need(320, unranked, shape) == KernelCost(
        320 * 4 * 36 * 16, 20 * 2 * 36 * 32 + 320 * 128 / 2 + 320 * 4 * 4 / 2
    )
    assert kernel_costs.vote(320, unranked, shape) == NO_COST
    # the search reads the votes; by need also what they find near
    whole, sampled = (
        kernel_costs.call_total(kernel_costs.selection_kernels(320, one, shape))
        for one in (config, small(vote="sampled"))
    )
    assert whole.flops == sampled.flops + need.flops
    assert whole.bytes == sampled.bytes + need.bytes + vote.bytes + 320 / 4 * 4 * 4
    a_head = kernel_costs.prompt_attention(320, small(dense_tail=0, group_shared=False), shape)
    assert (
        a_head.bytes - one.bytes == 20 * 2 * 52 * 2 * 16 * 2
    )  # two selections of a key head are two gathers
    # 80 blocks of 4 keys: of a tile of 32 become 63 chunks of two vectors and a state of three in
    # fp32, and one above
    assert kernel_costs.pyramid(320, config, shape) == KernelCost(
        0, 80 * 2 * (4 * 32 + 63 / 32 * 64 + 3 * 64 / 32)
    )
    assert kernel_costs.merges(80, config, shape) == KernelCost(0, 80 / 32 * 2 * (64 + 3 * 3 * 64))
    gradient = kernel_costs.query_gradients(320, config, shape)
    assert gradient == KernelCost(6 * 320 * 4 * 52 * 16, 20 * 2 * 52 * 64 + 4 * 320 * 128)
    # tiles of 64 keys, 16 blocks, of which two are selected: each of the other 8 pairs for nothing,
    # 164 keys in place of 52
    gradient = kernel_costs.key_gradients(320, config, shape)
    assert gradient == KernelCost(8 * 320 * 4 * 164 * 16, 320 * 164 / 64 * 2 * 128)


def test_the_search_adds_up() -> None:
    """By hand: at 320 keys 4 levels of 16 chunks of two vectors are scored, and 8 blocks of 4 keys
    exactly."""
    config, search = small(rescore=2), kernel_costs.search
    # a head's votes are 4, of which half walk: 8 and 4 of two heads in one tile of 16 rows, 64 and
    # 32 of 16 heads in two and one
    assert search(320, config, Shape(4, 2, 16), 16) == KernelCost(
        2 * (4 * 128 + 8 * 32) * 16, (128 + 32) * 32
    )
    assert search(320, config, Shape(32, 2, 16), 16) == KernelCost(
        2 * (32 * 128 + 64 * 32) * 16, (128 + 2 * 32) * 32
    )
    # every row of 4 heads votes, and walks
    every = search(320, small(rescore=2, query_stride=1), Shape(8, 2, 16), 16)
    assert every == KernelCost(2 * 64 * (128 + 32) * 16, 2 * (128 + 32) * 32)
    assert search(320, small(), Shape(4, 2, 16), 16) == KernelCost(
        2 * 8 * 128 * 16, 128 * 32
    )  # nothing exactly


def test_a_decode_step_adds_up() -> None:
    """By hand: one row of 4 query heads on 2 key heads of 16 numbers in 4 bytes, whose tiles are 32
    keys."""
    config, shape = small(rescore=2), Shape(4, 2, 16, 4)
    # 21 keys in any case; q, and a number of each head
    need = kernel_costs.step_need
    assert need(320, config, shape) == KernelCost(2 * 4 * 21 * 16, 2 * 21 * 64 + 256 + 4 * 4)
    assert (
        need(320, small(vote="sampled"), shape) == need(320, small(score="max"), shape) == NO_COST
    )
    # as many programs as a block has keys share each of 2 searches: all read 4 levels, each a
    # quarter of 32 keys; they leave 64 places of blocks and, in 65, what two votes found
    left, search = 64 * 4 + 4 * 65 * 2 * 4, kernel_costs.step_search
    moved = 2 * ((4 * 128 + 32) * 64 + left) + 4 * 256
    assert search(320, config, shape) == KernelCost(2 * 2 * 2 * (4 * 128 + 32) * 16, moved)
    assert kernel_costs.choice(320, config, shape) == KernelCost(0, 2 * left)
    # of 76 keys the 15 blocks between sink and window are looked at whole: no summary, no list,
    # room for 16 blocks in 128 places
    whole = 4 * 129 * 2 * 4
    assert search(80, config, shape) == KernelCost(
        2 * 2 * 2 * 60 * 16, 2 * (60 * 64 + whole) + 4 * 256
    )
    assert kernel_costs.choice(80, config, shape) == KernelCost(0, 2 * whole)
    alone = replace(shape, processors=1)
    assert search(320, config, alone) == KernelCost(
        2 * 2 * 2 * (128 + 32) * 16, 2 * (128 + 32) * 64 + 256
    )
    assert kernel_costs.choice(320, config, alone) == NO_COST
    # 36 keys, and up to 4 more before the next selection, are two tiles for two programs; each
    # leaves 17 numbers of a head
    attention = kernel_costs.step_attention
    assert attention(320, config, shape) == KernelCost(
        4 * 4 * 36 * 16, 2 * 36 * 128 + 2 * (256 + 4 * 17 * 4)
    )
    assert attention(320, config, alone).bytes == 2 * 36 * 128 + 2 * 256
    # a tile has 16.5 blocks on average when one is completed, which are 975 / 32 chunks: of each of
    # 32 tiles 2 n - ones(n)
    chunks = sum(2 * n - bin(n).count("1") for n in range(1, 33)) / 32
    written = (
        chunks * 128 + 3 * 64 / 32 + (128 + 3 * 3 * 64) / 32
    )  # and the root's state, and what lies above it
    assert kernel_costs.step_kernels(320, config, shape, 4)["append_kernel"] == KernelCost(
        0, 2 * (16.5 * 4 * 64 + written) / 4
    )
