"""`hip-hf latency --device cuda` on tiny calls: everything but the device's clock and graphs, and on a GPU those as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, small
from interpreter import DEVICE

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from typer.testing import CliRunner

from hip_hf.config import HiPConfig
from hip_hf.eval import floors, gpu_latency, kernel_costs, latency
from hip_hf.eval.cells import Cells
from hip_hf.eval.gpu_latency import Bench, Clock, Steps, measure
from hip_hf.eval.kernel_costs import Cost
from hip_hf.eval.latency import Plan, ours
from hip_hf.eval.presets import sizes
from hip_hf.kernels import prefill
from hip_hf.kernels.addressing import KeyValues
from hip_hf.kernels.backward import Part, query_gradient_arguments
from hip_hf.kernels.prefill import Logits, dense_reads
from hip_hf.kernels.sequences import Sequences
from hip_hf.kernels.tuning import target_of
from hip_hf.problem import Span
from hip_hf.state import DecodeState

pytestmark = pytest.mark.kernels

LENGTH = 72
COLUMNS = (
    "phase dtype batch length settings hip_ms sdpa_ms sdpa times_faster tokens_per_s tflops gb_per_s over_floor selecting "
    "peak_gb sdpa_peak_gb path reason runs"
)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


def kernels(**fields: Any) -> HiPConfig:
    return small(backend="triton", **{"decode_refresh": 2, **fields})


def plan(**fields: Any) -> Plan:
    shape = dict(heads=2, kv_heads=1, head_dim=16, repeats=1, device=torch.device(DEVICE), dtypes=["fp16"])
    return Plan(**{**shape, "settings": {"small": kernels()}, **fields})


def by_phase(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["phase"]: row for row in rows}


def test_rows_of_every_phase() -> None:
    rows, refused = measure(plan(), ("prefill", "decode", "backward", "selection"), [LENGTH])
    found = by_phase(rows)
    phases = ["prefill", "selection", "decode amortised", "decode refreshed", "decode selection", "backward"]
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
    shape, config = kernel_costs.Shape(2, 1, 16, 2), kernels()
    cost = kernel_costs.prefill(LENGTH, config, shape) + kernel_costs.selection(LENGTH, config, shape)
    assert found["prefill"]["tflops"] == pytest.approx(cost.flops / found["prefill"]["hip_ms"] / 1e9)
    assert found["prefill"]["gb_per_s"] == pytest.approx(cost.bytes / found["prefill"]["hip_ms"] / 1e6)
    assert found["prefill"]["selecting"] == pytest.approx(found["selection"]["hip_ms"] / found["prefill"]["hip_ms"])
    chosen = found["decode selection"]["hip_ms"]
    assert found["decode refreshed"]["selecting"] == pytest.approx(chosen / found["decode refreshed"]["hip_ms"])
    assert found["decode amortised"]["selecting"] == pytest.approx(chosen / 2 / found["decode amortised"]["hip_ms"])
    if DEVICE == "cpu":  # where cuDNN is not
        assert any(line.startswith("prefill, fp16: cudnn: ") for line in refused)


def test_decode_of_a_batch_in_graphs_and_launched() -> None:
    """Every row of the batch counts, in tokens and in the model's work."""
    one, three = (by_phase(measure(plan(batch=batch), ("decode", "launched"), [LENGTH])[0]) for batch in (1, 3))
    phases = ["decode amortised", "decode refreshed"]
    assert list(three) == [*phases, "decode selection", *(f"{phase}, launched" for phase in phases)]
    for phase, row in three.items():
        assert (row["batch"], row["path"]) == (3, "sparse")
        assert row["tokens_per_s"] == pytest.approx(3000 / row["hip_ms"])
        assert row["tflops"] * row["hip_ms"] == pytest.approx(3 * one[phase]["tflops"] * one[phase]["hip_ms"])
        assert (row["sdpa_ms"] is None) == (phase == "decode selection")


def test_backends_that_are_not_asked_for_are_no_baselines() -> None:
    (row,), refused = measure(plan(), ("prefill",), [LENGTH], backends=())
    assert (row["sdpa"], row["sdpa_ms"], refused) == ("-", None, [])


def test_a_baseline_that_takes_the_probe_and_not_the_call_drops_out() -> None:
    bench = Bench(plan(), "fp16", Clock(torch.device(DEVICE)))

    def full() -> None:
        raise torch.OutOfMemoryError("full\nof it")

    dense = {"flash": bench.call(full), "cudnn": bench.call(lambda: None)}
    ours = bench.call(lambda: None)
    bench.time("prefill", dense, [ours])
    assert list(dense) == ["cudnn"]
    assert [len(call.seconds) for call in (dense["cudnn"], ours)] == [1, 1]
    assert list(bench.refused) == ["prefill, fp16: flash: full"]


def test_finished_cells_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        measure(*asked, cells=Cells(output, {}))
    assert done == [LENGTH, LENGTH + 8]
    done[:] = [0, 0]
    cells = Cells(output, {})
    kept = next(iter(cells.done.values()))
    rows, refused = measure(*asked, cells=cells)
    assert done == [0, 0, LENGTH + 8]
    assert rows[: len(kept["rows"])] == kept["rows"]
    assert {row["length"] for row in rows} == {LENGTH, LENGTH + 8}
    assert {f"at {LENGTH}", f"at {LENGTH + 8}"} <= set(refused)


def test_short_contexts_are_measured_as_what_they_are() -> None:
    rows, _ = measure(plan(settings={"far": kernels(dense_below=10**6)}), ("prefill", "decode", "selection"), [LENGTH])
    found = by_phase(rows)
    assert list(found) == ["prefill", "decode amortised", "decode refreshed"]  # nothing selects
    for row in rows:
        assert (row["path"], row["selecting"]) == ("dense", None)
        assert "dense_below" in row["reason"]


def test_a_method_without_a_model_has_no_figures_from_it() -> None:
    rows, _ = measure(plan(settings={"local": kernels(method="streaming")}), ("prefill", "decode"), [LENGTH])
    assert {row["phase"] for row in rows} == {"prefill", "decode amortised", "decode refreshed"}
    assert all((row["path"], row["tflops"], row["selecting"]) == ("sparse", None, None) for row in rows)


def test_the_faster_baseline_is_the_one_that_counts() -> None:
    bench = Bench(plan(), "fp16", Clock(torch.device(DEVICE)))
    calls = {name: bench.call(lambda: None) for name in ("ours", "flash", "cudnn")}
    for name, seconds in (("ours", [2.0]), ("flash", [6.0, 9.0, 7.0]), ("cudnn", [8.0, 5.0, 5.5])):
        calls[name].seconds = seconds
    dense = {name: calls[name] for name in ("flash", "cudnn")}
    measured = gpu_latency.Measured("prefill", 4096, {"small": calls["ours"]}, dense, {"small": 1}, tokens=4096)
    (row,) = bench.rows(measured, {"small": kernels()}, {"small": 0.5})
    assert (row["sdpa"], row["sdpa_ms"], row["times_faster"], row["selecting"]) == ("cudnn", 5500.0, 2.75, 0.25)


def test_a_backend_that_refuses_is_named() -> None:
    bench = Bench(plan(), "fp16", Clock(torch.device(DEVICE)))

    def probe() -> None:
        raise RuntimeError("No available kernel.\nMore of it.")

    assert bench.baselines("prefill", probe, probe) == {}
    assert list(bench.refused) == [f"prefill, fp16: {name}: No available kernel." for name in ("flash", "cudnn")]


@pytest.mark.parametrize(("refresh", "batch"), [(1, 1), (2, 1), (2, 3)])
def test_steps_give_what_decode_gives_each_time_they_run(refresh: int, batch: int) -> None:
    """The steps of a run are those of generation after a prompt; a second run repeats the first, also after others with the same
    state."""
    length, count, config = 100, 5, kernels(decode_refresh=refresh)
    q, k, v = plan(batch=batch).random("fp32", length + count, count, torch.device(DEVICE))
    state = DecodeState()
    before = torch.zeros(batch, q.shape[1], length, q.shape[3], device=q.device)
    ours(before, k[:, :, :length], v[:, :, :length], config, state)
    for step in range(count):
        end = length + step + 1
        want = ours(q[:, :, step : step + 1], k[:, :, :end], v[:, :, :end], config, state)
        assert (want.path, want.reason) == ("sparse", "")
    steps = Steps(q, k, v, length, count, config)
    others = Steps(q, k, v, length, count, replace(config, decode_refresh=4), attend=False, state=steps.state)
    for between in (lambda: None, others):
        between()
        assert_near(steps().cpu(), want.out.cpu(), 1e-6)


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(latency.main)
    return CliRunner().invoke(app, arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    result = run("--device", "cuda")
    assert result.exit_code == 2
    assert "torch sees no GPU" in " ".join(result.output.replace("│", " ").split())


def test_the_command_prints_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line on, with the machine's device in place of the one asked for."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "device", lambda name: latency.CPU)
        monkeypatch.setattr(latency.report, "machine", lambda: {"cpu": "a CPU", "threads": 1, "gpu": None, "torch": "2"})
    shape = ("--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--repeats", "1", "--lengths", str(LENGTH))
    fields = {key: value for key, value in kernels().to_dict().items() if value != HiPConfig().to_dict()[key]}
    result = run("--device", "cuda", "--phases", "prefill,selection", *shape, "--settings", json.dumps(fields), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["phase"] for row in document["rows"]] == ["prefill", "selection"]
    assert document["rows"][0]["dtype"] == "bf16"
    assert "4 query heads, 2 key heads, D=16" in document["title"]
    wrong = run("--device", "cuda", "--settings", '{"method": "quest"}')
    assert wrong.exit_code == 2
    assert "quest" in wrong.output


@pytest.mark.parametrize("arguments", [("--device", "tpu"), ("--phases", "backward"), ("--lengths", "1G"), ("--lengths", "M")])
def test_bad_arguments_are_named(arguments: tuple[str, str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_lengths() -> None:
    assert sizes("8K, 1M,300") == [8192, 2**20, 300]


def test_the_table_in_the_documentation_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what was measured, where the results of a GPU are there."""
    monkeypatch.setattr("sys.argv", ["floors"])
    floors.main()
    page = (Path(__file__).resolve().parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)])
def test_the_model_counts_the_tiles_that_are_launched(group: int, dim: int, dtype: torch.dtype) -> None:
    """Each tile of a query block gathers the block's keys: as many as programs of a head and query block, forward and for dQ."""
    q, k = (torch.empty(1, heads, 128, dim, dtype=dtype, device=DEVICE) for heads in (2 * group, 2))
    kv, sequences = KeyValues(k, k), Sequences.of([Span(0, 0, 128, 0, 128, 0)], q.device)
    shape = kernel_costs.Shape(2 * group, 2, dim, dtype.itemsize, target_of(q))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for block_q in (64, 32):
        reads = dense_reads(block_q)
        (tiles, lists, _), _ = prefill.call_arguments(q, kv, sequences, reads, Logits(1.0), q, lse, shape.tile("prefill"))
        assert (tiles, lists) == (sequences.blocks(block_q) * shape.row_tiles("prefill", block_q, 2), 2)
        of_queries = (q, kv, Part(sequences, reads), Logits(1.0), q, lse, q, None, q, lse, shape.tile("backward queries"))
        (tiles, lists, _), _ = query_gradient_arguments(*of_queries)
        assert (tiles, lists) == (sequences.blocks(block_q) * shape.row_tiles("backward queries", block_q, 2), 2)


def test_the_model_adds_up() -> None:
    """By hand, for a small prompt: 4 query heads on 2 key heads of 16 numbers in 2 bytes, query blocks of 16 rows."""
    shape = kernel_costs.Shape(4, 2, 16, 2)
    assert shape.row_tiles("prefill", 16, 2) == 1
    config = small(dense_tail=0, options={"sample": 256})  # sink 4, budget 16, window 16, and the block's own 16
    one = kernel_costs.prefill(320, config, shape)
    assert one.flops == 4 * 320 * 4 * 52 * 16
    assert one.bytes == 20 * 2 * 52 * 2 * 16 * 2 + 2 * 320 * 4 * 16 * 2
    with_tail = kernel_costs.prefill(320, small(dense_tail=64), shape)
    assert with_tail.flops == 4 * 4 * 16 * (256 * 52 + 64 * 320)
    assert with_tail.bytes == 16 * 2 * 52 * 64 + 1 * 2 * 320 * 64 + 2 * 320 * 128
    # by need, of half of the rows with 36 keys that are always read and a sample of 256: a quarter of all rows are copied;
    # sampled rows are only read
    need, vote = kernel_costs.need(320, config, shape), kernel_costs.vote(320, config, shape)
    assert need == Cost(320 * 4 * 292 * 16, 20 * 2 * 292 * 32 + 320 * 128 / 2 + 320 * 4 * 4 * 2 / 2)
    assert vote == Cost(0, 320 * 128 * 2 / 4 + 320 * 4 * 4 * (1 / 2 + 2 / 4))
    # with `query_stride=2` all that are asked vote, and are read where they lie
    unranked = small(query_stride=2)
    assert kernel_costs.need(320, unranked, shape) == Cost(320 * 4 * 36 * 16, 20 * 2 * 36 * 32 + 320 * 128 / 2 + 320 * 4 * 4 / 2)
    assert kernel_costs.vote(320, unranked, shape) == Cost(0, 0)
    # the search reads the votes; by need also what they find near
    whole, sampled = (kernel_costs.selection(320, one, shape) for one in (config, small(vote="sampled")))
    assert whole.flops == sampled.flops + need.flops
    assert whole.bytes == sampled.bytes + need.bytes + vote.bytes + 320 / 4 * 4 * 4
    a_head = kernel_costs.prefill(320, small(dense_tail=0, group_shared=False), shape)
    assert a_head.bytes - one.bytes == 20 * 2 * 52 * 2 * 16 * 2  # two selections of a key head are two gathers
