"""Results as files: one style of document, pictures with labelled axes, and pages that a browser
shows without any other file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shlex import split
from typing import Any

import matplotlib.figure
import pytest
import torch
from browser import broken_links, visit
from commands import SMALL, invoke, refused, run, save_checkpoint

from hip_hf.cli import compare, fidelity, latency, needles, passkey, perplexity, report_page
from hip_hf.eval.reporting import report
from hip_hf.eval.reporting.pictures import PICTURES
from hip_hf.eval.reporting.report import AT

SETTINGS = ["--settings", "dense", "--settings", json.dumps(SMALL)]
BLOCKS = json.dumps({name: value for name, value in SMALL.items() if name.startswith("block")})
# Small runs of the commands that measure; of `memory`, which starts processes, a document made by
# hand.
ONE = split("--tokens 512 --facts 1 --prompts 1")
COMPARED = split("--depths 1 --samples 1 --budgets 32,64 --sink 8 --window 16")
COMPARED += [*SETTINGS[:2], "--settings", BLOCKS, "--settings", "streaming"]
TIMED = split("--heads 2 --kv-heads 1 --head-dim 16 --repeats 1 --dtypes fp32 --lengths 256,512")
RUNS: dict[str, tuple[Any, list[str], bool]] = {
    "passkey": (passkey, ["--lengths", "256", "--depths", "2", "--samples", "1", *SETTINGS], True),
    "needles": (needles, ["--lengths", "400", "--prompts", "1", "--facts", "2", *SETTINGS], True),
    "perplexity": (perplexity, ["--tokens", "512", *SETTINGS], True),
    "fidelity": (fidelity, [*ONE, *SETTINGS[2:]], True),
    "compare": (compare, [*ONE, *COMPARED], True),
    "latency": (latency, TIMED, False),
}
MEMORY = {
    "command": "memory",
    "title": "Memory of caches",
    "rows": [
        {
            "cache": kind,
            "length": length,
            "bytes_per_token": 9.5,
            "resident_MiB": 1.0,
            "peak_MiB": 2.0,
            "device_MiB": 1.0,
        }
        for kind in ("dynamic", "hip")
        for length in (8192, 32768)
    ],
    "model": "a <b> & c",
    "machine": {"cpu": "x", "gpu": None},
}
# And of the benchmark of all tasks, which takes hours.
READ = {"samples": 10, "read_prefill": 0.2, "read_decode": 0.1}
LONGCTX = {
    "command": "longctx",
    "title": "hip_longctx, 4,096 tokens",
    "rows": [
        {"task": task, "settings": name, "value": v, "low": v / 2, "high": 2 * v, **READ}
        for task, v in (("hip_passkey", 0.5), ("hip_copying", 0.1), ("hip_perplexity", 40.0))
        for name in ("dense", "defaults")
    ],
    "model": "the demo checkpoint",
    "machine": {"cpu": "x", "gpu": None},
}
# And of a served model under load.
SERVING = {
    "command": "serving",
    "title": "hip-hf serve, smollm2",
    "rows": [
        {
            "tokens": tokens,
            "clients": clients,
            "attention": name,
            "first_token_s": 2.0,
            "tokens_per_s": 8.0,
            "prompt_tokens": tokens,
        }
        for tokens in (2048, 8192)
        for clients in (1, 8)
        for name in ("sdpa", "hip")
    ],
    "model": "smollm2",
    "machine": {"cpu": "x", "gpu": None},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A result file of every command, and what the command printed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # such small tensors only wait for each other
    folder = tmp_path_factory.mktemp("results")
    model, text = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    found = {}
    for name, (command, arguments, reads) in RUNS.items():
        given = (
            [model, "--documents" if command is needles else "--document", text, *arguments]
            if reads
            else arguments
        )
        files = ["--output", str(folder / f"{name}.json"), "--report", str(folder / f"{name}.html")]
        found[name] = (folder / f"{name}.json", run(command.main, *given, *files))
    torch.set_num_threads(before)
    for document in (MEMORY, LONGCTX, SERVING):
        file = folder / f"{document['command']}.json"
        file.write_text(json.dumps(document))
        found[str(document["command"])] = (file, document)
    return found


def test_documents_have_one_shape(saved: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    assert set(saved) == set(PICTURES)
    for name, (file, printed) in saved.items():
        assert json.loads(file.read_text()) == printed
        assert printed["command"] == name
        assert printed["title"]
        assert printed["machine"]["cpu"]
        assert len({tuple(row) for row in printed["rows"]}) == 1  # the same columns in every row


def test_every_axis_has_a_label(
    saved: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *a, **k: drawn.append(self) or save(self, *a, **k),
    )
    for name, draw in PICTURES.items():
        drawn.clear()
        draw(saved[name][1], tmp_path / f"{name}.png")
        (figure,) = drawn
        axes = [axis for axis in figure.axes if axis.get_visible()]
        assert axes
        assert any(axis.get_ylabel() for axis in axes), name
        first = [axis for axis in axes if axis.get_subplotspec() is not None]
        for axis in first:
            assert axis.get_xlabel(), name
            # a panel without a label of its own shares the first one's scale
            assert axis.get_ylabel() or axis.get_title(), name


def test_compare_has_a_row_for_each_setting(saved: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    rows = {row["settings"]: row for row in saved["compare"][1]["rows"]}
    assert list(rows) == [
        "dense",
        f"{BLOCKS}{AT}32",
        f"streaming{AT}32",
        f"{BLOCKS}{AT}64",
        f"streaming{AT}64",
    ]
    assert rows["dense"]["ratio"] == 1
    assert rows["dense"]["mass"] is None
    assert all(
        0 < row["mass"] < 1 and row["perplexity"] > 1
        for name, row in rows.items()
        if name != "dense"
    )
    assert rows[f"streaming{AT}32"]["mass"] < rows[f"streaming{AT}64"]["mass"]
    assert all(row["samples"] == 1 for row in rows.values())
    assert rows["dense"]["needle_ratio"] == 1
    assert all(
        0 <= row["needle_answers"] <= row["needle_digits"] <= 1 < row["needle_nll"]
        for row in rows.values()
    )
    assert all(row["needle_ratio"] != 1 for name, row in rows.items() if name != "dense")


@pytest.mark.parametrize("name", RUNS)
def test_a_browser_shows_the_page_of_a_run(
    name: str, saved: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    file, printed = saved[name]
    page = file.with_suffix(".html")
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page.read_text())  # needs no other file
    seen = visit(page, tmp_path)
    assert seen.title == printed["title"]
    assert (seen.failed, seen.broken_images) == ([], [])
    assert [own > 400 for _, own, _ in seen.images] == [True]
    for row in printed["rows"]:
        assert str(next(iter(row.values()))) in seen.text


def test_report_bundles_results_in_one_page(
    saved: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    page = tmp_path / "all.html"
    files = [str(file) for file, _ in saved.values()]
    given = ("--output", page, "--title", "Everything <measured>")
    result = invoke(report_page.main, *files, *given)
    assert result.exit_code == 0, result.output
    seen = visit(page, tmp_path / "browser")
    assert seen.title == "Everything <measured>"
    assert len(seen.images) == len(saved)
    assert (seen.failed, seen.broken_images) == ([], [])
    anchors = [link.rpartition("#")[2] for link in seen.links]
    assert len(anchors) == len(saved)
    assert set(anchors) <= set(seen.ids)
    assert seen.width[0] <= seen.width[1]  # no scrolling to the side
    for _, document in saved.values():
        assert document["title"] in " ".join(seen.text.split())


def test_the_browser_test_sees_what_is_broken(tmp_path: Path) -> None:
    """The check can fail: a page with a missing image and a script that raises."""
    page = tmp_path / "page.html"
    links = '<a href="gone.html">x</a><a href="#gone">y</a><a href="#here" id="here">z</a>'
    body = f'<img src="nowhere.png"><script>boom()</script>{links}'
    page.write_text(f"<html><head></head><body>{body}</body></html>")
    seen = visit(page, tmp_path / "browser")
    assert seen.broken_images == ["nowhere.png"]
    assert any("nowhere.png" in what for what in seen.failed)
    assert any("boom" in what for what in seen.failed)
    assert [link.rpartition("/")[2] for link in broken_links({page: seen})] == [
        "gone.html",
        "page.html#gone (no such place)",
    ]


def test_a_table_that_no_terminal_shows_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    row = {f"column_{i}": f"a value of {'n' * 20} {i}" for i in range(20)}
    report.show("title", [row], False)
    lines = capsys.readouterr().out.splitlines()
    for wanted in (row.values(), (name.replace("_", " ") for name in row)):
        text = list(wanted)
        assert any(all(part in line for part in text) for line in lines)


def test_refusals(tmp_path: Path, saved: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    file, other = str(saved["passkey"][0]), tmp_path / "other.json"
    assert "hip-hf passkey" in refused(report_page.main, str(tmp_path / "gone.json"))
    for text in (
        "{",
        "[]",
        '{"rows": []}',
        '{"command": "passkey", "rows": []}',
        '{"command": "demo", "rows": [1]}',
    ):
        other.write_text(text)
        assert "RESULTS" in refused(report_page.main, file, str(other))
    assert "--output" in refused(report_page.main, file, "--output", str(tmp_path))
    assert "--measures" in refused(compare.main, "--measures", "speed")
    assert "dense attention alone" in refused(compare.main, "--settings", "dense")
    assert "multiple of 128" in refused(compare.main, "--tokens", "1000")
