"""The latency command: its rows, its fit and its arguments. Times are never compared with anything
but zero."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split
from typing import Any

import pytest
from commands import invoke
from helpers import small

from hip_hf.cli import latency as latency_command
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import latency
from hip_hf.eval.measure.latency import (
    GrowingSteps,
    TimedRun,
    TimingPlan,
    exponents,
    fit_exponent,
    interleave,
    latency_rows,
)
from hip_hf.methods.hip import TreeSearch

COLUMNS = (
    "phase dtype length settings hip_ms sdpa_ms times_faster path reason keys_read runs sdpa_runs"
)
SMALL = {
    key: value for key, value in small().to_dict().items() if value != HiPConfig().to_dict()[key]
}


def plan(**fields: Any) -> TimingPlan:
    given = dict(
        prefill=[256], decode=[256], dtypes=["fp32"], heads=4, kv_heads=2, head_dim=16, repeats=2
    )
    return TimingPlan(**{**given, "settings": {"small": small()}, **fields})


def test_rows_have_every_column_and_positive_times() -> None:
    rows = latency_rows(plan(dtypes=["fp32", "bf16"]))
    assert [(row["phase"], row["dtype"]) for row in rows] == [
        (phase, dtype)
        for phases in [["prefill"], ["decode amortised", "decode refreshed"]]
        for dtype in ("fp32", "bf16")
        for phase in phases
    ]
    for row in rows:
        assert " ".join(row) == COLUMNS
        assert row["hip_ms"] > 0
        assert row["sdpa_ms"] > 0
        assert row["times_faster"] == pytest.approx(row["sdpa_ms"] / row["hip_ms"])
        assert (row["path"], row["reason"]) == ("sparse", "")
        assert 0 < row["keys_read"] < 1
        assert (row["runs"], row["sdpa_runs"]) == (2, 2)


def test_the_shipped_fallback_is_measured_and_named() -> None:
    rows = latency_rows(plan(settings={"defaults": HiPConfig(), "small": small()}))
    paths = {(row["phase"], row["settings"]): (row["path"], row["reason"]) for row in rows}
    assert paths["prefill", "defaults"] == ("dense", "context of 256 is below dense_below=10240")
    assert paths["decode amortised", "defaults"][0] == "dense"
    assert paths["prefill", "small"] == ("sparse", "")


def test_settings_share_the_dense_runs() -> None:
    rows = latency_rows(plan(settings={"one": small(), "two": small(beam=1)}))
    by_phase: dict[str, set[float]] = {}
    for row in rows:
        by_phase.setdefault(row["phase"].split()[0], set()).add(row["sdpa_ms"])
    assert {phase: len(times) for phase, times in by_phase.items()} == {"prefill": 1, "decode": 1}


def test_runs_alternate_and_slow_calls_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def make(name: str, seconds: float) -> TimedRun:
        def work() -> None:
            order.append(name)
            now[0] += seconds

        return TimedRun(work)

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    calls = [make("hour", 3600), make("half a minute", 30), make("instant", 0.001)]
    interleave(calls, 3)
    assert [len(call.seconds) for call in calls] == [1, 2, 3]  # the last was warmed up first
    assert order == [
        "hour",
        "half a minute",
        "instant",
        "half a minute",
        "instant",
        "instant",
        "instant",
    ]


@pytest.mark.parametrize(("refresh", "searches"), [(4, 3), (1, 12)])
def test_decode_searches_as_often_as_the_settings_say(
    refresh: int, searches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    select = TreeSearch.select
    monkeypatch.setattr(
        TreeSearch, "select", lambda self, *args: searched.append(1) or select(self, *args)
    )
    steps = GrowingSteps(
        plan().random("fp32", 256 + 12, 12), 256, 12, small(decode_refresh=refresh)
    )
    result = steps()
    assert result is not None
    assert result.path == "sparse"
    assert len(searched) == searches
    assert steps.length == 256 + 12


def test_decode_of_stages_runs_over_the_longest_interval() -> None:
    """Each stage has an interval of its own."""
    config = small(
        method="staged", options={"stages": [[8, 64, 2], [4, 16, 2]]}, decode_refresh=[8, 4]
    )
    assert latency.refresh_period(config) == 8
    assert latency.refresh_period(small(decode_refresh=3)) == 3
    phases = [
        (row["phase"], row["path"])
        for row in latency_rows(plan(prefill=[], settings={"staged": config}))
    ]
    assert phases == [(latency.AMORTISED, "sparse"), (latency.REFRESHED, "sparse")]


def test_random_tensors_are_seeded() -> None:
    first, again, other = (plan(seed=seed).random("fp32", 8, 8)[0] for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.fast
def test_fit_exponent() -> None:
    lengths = [16384, 32768, 65536, 131072]
    assert fit_exponent(lengths, [3e-7 * length**1.3 for length in lengths]) == pytest.approx(1.3)
    assert fit_exponent([16384], [1.0]) is None


def test_exponents_take_sparse_prefill_in_range_only() -> None:
    def row(phase: str, length: int, path: str, hip: float) -> dict[str, Any]:
        return dict(
            phase=phase,
            dtype="fp32",
            settings="defaults",
            length=length,
            path=path,
            hip_ms=hip,
            sdpa_ms=length**2,
        )

    rows = [row("prefill", length, "sparse", length**1.1) for length in (16384, 65536, 131072)]
    rows += [
        row("prefill", 1024, "dense", 1e9),
        row("prefill", 8192, "sparse", 1e9),
        row("prefill", 32768, "dense", 1e9),
    ]
    rows += [row("decode amortised", 16384, "sparse", 1e9)]
    (fit,) = exponents(rows)
    assert fit["lengths"] == [16384, 65536, 131072]
    assert (fit["hip"], fit["sdpa"]) == (pytest.approx(1.1), pytest.approx(2))


@pytest.mark.fast
def test_command_prints_json_and_writes_files(tmp_path: Path) -> None:
    output, picture = tmp_path / "latency.json", tmp_path / "latency.png"
    sizes = "--heads 4 --kv-heads 2 --head-dim 16 --repeats 1 --dtypes fp32 --lengths 256,1K"
    given = ("--settings", json.dumps(SMALL), "--output", output, "--plot", picture, "--json")
    result = invoke(latency_command.main, *split(sizes), *given)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["length"] for row in document["rows"]] == [256, 1024, 256, 256, 1024, 1024]
    assert document["configs"][json.dumps(SMALL)]["budget"] == 16
    assert document["exponents"][0]["hip"] is None  # too short to fit
    assert json.loads(output.read_text()) == document
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_prints_a_table_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--lengths", 64, "--phases", "prefill", "--dtypes", "fp32", "--repeats", 1)
    result = invoke(latency_command.main, *given)
    assert result.exit_code == 0, result.output
    assert "dense prefill at 64: context of 64 is below dense_below=10240" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lengths", "8Q"),
        ("--lengths", "0"),
        ("--dtypes", "fp8"),
        ("--phases", "training"),
        ("--settings", "fastest"),
        ("--settings", '{"budget": 7}'),
        ("--settings", '{"extend": "streaming"}'),
        ("--heads", "3"),
    ],
)
def test_command_refuses_what_it_cannot_do(arguments: tuple[str, str]) -> None:
    result = invoke(latency_command.main, *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
