"""Finished measurements: kept through an interruption, refused to another run, gone when the result
is written."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split
from typing import Any

import pytest
from commands import SMALL, invoke, refused, save_checkpoint

from hip_hf.cli import compare, fidelity, latency, needles, passkey, perplexity
from hip_hf.eval import measure
from hip_hf.eval.measure import latency as measured
from hip_hf.eval.reporting.resumable import SUFFIX, Resumable

pytestmark = pytest.mark.fast


def test_cells_are_measured_once_and_refuse_another_request(tmp_path: Path) -> None:
    output, calls = tmp_path / "out.json", []

    def work(value: Any) -> Any:
        calls.append(value)
        return value

    with Resumable(output, {"seed": 0}) as kept:
        assert kept.get(("a", 1), lambda: work({"x": 0.1})) == {"x": 0.1}
        assert kept.get(("a", 2), lambda: work([1 / 3])) == [1 / 3]
    again = Resumable(output, {"seed": 0})
    assert again.get(("a", 1), lambda: work("not again")) == {"x": 0.1}
    assert again.get(("a", 2), lambda: work("not again")) == [1 / 3]
    assert calls == [{"x": 0.1}, [1 / 3]]
    with pytest.raises(ValueError, match="other seed"):
        Resumable(output, {"seed": 1})
    again.finish()
    assert list(tmp_path.iterdir()) == []
    Resumable(output, {"seed": 1})


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    kept = Resumable(output, {})
    for name in ("one", "two"):
        kept.get((name,), lambda: {"value": 12345})
    file = tmp_path / f"out.json{SUFFIX}"
    whole = file.read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        file.write_text(whole[:-cut])
        assert list(Resumable(output, {}).done) == ['["one"]']
        assert file.read_text() == "".join(line + "\n" for line in whole.splitlines()[:-1])


@pytest.mark.parametrize(
    "content",
    [
        b"something else\n",
        b"[]\n",
        b'{"request": 1}\n',
        b'{"request": {}}\n[1]\n',
        b'{"request": {}}\n{"a\n',
        b"\xff\n",
    ],
)
def test_a_file_that_is_none_of_finished_cells_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"out.json{SUFFIX}"
    file.write_bytes(content)
    said = r"got 'out.json.partial', which is no file of finished measurements, allowed: .* remove"
    with pytest.raises(ValueError, match=rf"--output: {said}"):
        Resumable(tmp_path / "out.json", {})
    assert file.read_bytes() == content


def test_without_an_output_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Resumable(None, {})
    assert [kept.get(("a",), lambda: 1), kept.get(("a",), lambda: 2)] == [1, 1]
    kept.finish()
    assert list(tmp_path.iterdir()) == []


# Where each command takes a measurement, and small runs of several.
COMMANDS: dict[str, tuple[Any, tuple[Any, str], list[str]]] = {
    "passkey": (
        passkey,
        (measure.passkey, "answer_samples"),
        ["--lengths", "200,256", "--depths", "2", "--samples", "2", "--settings", "dense"],
    ),
    "needles": (
        needles,
        (measure.needles, "read_needles"),
        ["--lengths", "400", "--prompts", "2", "--facts", "2", "--settings", "dense"],
    ),
    "perplexity": (
        perplexity,
        (measure.perplexity, "read_losses"),
        ["--tokens", "512", "--settings", "dense"],
    ),
    "fidelity": (
        fidelity,
        (measure.fidelity, "measure_prompt"),
        ["--tokens", "512", "--prompts", "3", "--facts", "1"],
    ),
    "compare": (
        compare,
        (measure.passkey, "answer_samples"),
        split("--tokens 512 --prompts 1 --facts 1 --depths 2 --samples 1 --settings dense"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_run_resumed_gives_the_same_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Any
) -> None:
    threads(1)  # such small tensors only wait for each other
    command, (owner, measures), arguments = COMMANDS[name]
    model, text = save_checkpoint(tmp_path)
    given = [
        model,
        "--documents" if command is needles else "--document",
        text,
        *arguments,
        "--settings",
        json.dumps(SMALL),
    ]
    real, calls = getattr(owner, measures), []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(owner, measures, counted)
    whole = tmp_path / "whole.json"
    assert invoke(command.main, *given, "--output", str(whole)).exit_code == 0
    needed = len(calls)
    assert needed > 2

    def interrupted(*args: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        return counted(*args)

    calls.clear()
    resumed = tmp_path / "resumed.json"
    monkeypatch.setattr(owner, measures, interrupted)
    stopped = invoke(command.main, *given, "--output", str(resumed))
    assert stopped.exit_code != 0
    assert "goes on from there" in " ".join(stopped.stderr.split())
    assert not resumed.exists()
    monkeypatch.setattr(owner, measures, counted)
    if name != "perplexity":  # which draws nothing
        assert "other seed" in refused(
            command.main, *given, "--output", str(resumed), "--seed", "1"
        )
    assert invoke(command.main, *given, "--output", str(resumed)).exit_code == 0
    assert len(calls) == needed  # the finished ones were not measured again
    assert resumed.read_bytes() == whole.read_bytes()
    assert not resumed.with_name(resumed.name + SUFFIX).exists()


def test_latency_keeps_finished_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = [
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--head-dim",
        "16",
        "--repeats",
        "1",
        "--dtypes",
        "fp32",
        "--phases",
        "prefill",
    ]
    output = tmp_path / "latency.json"
    real, lengths = measured.prefill_rows, []

    def measure(plan: Any, dtype: str, length: int) -> Any:
        if length == 512 and lengths == [256]:
            raise KeyboardInterrupt
        lengths.append(length)
        return real(plan, dtype, length)

    monkeypatch.setattr(measured, "prefill_rows", measure)
    given = [*shape, "--lengths", "256,512", "--output", str(output)]
    assert invoke(latency.main, *given).exit_code != 0
    first = json.loads((tmp_path / f"latency.json{SUFFIX}").read_text().splitlines()[1])[1]
    lengths.append(0)
    assert invoke(latency.main, *given).exit_code == 0
    assert lengths == [256, 0, 512]
    assert json.loads(output.read_text())["rows"][:1] == first
