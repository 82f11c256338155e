"""The documentation: built without a warning, every page shown by a browser, no broken image, file or link."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import Seen, broken_links, visit

import hip_hf

if not os.environ.get("CI"):  # where it must have run
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    pytest.importorskip("myst_nb", reason="pip install '.[docs]'")

ROOT = Path(__file__).resolve().parent.parent
# Made by Sphinx beside the pages, and nowhere linked as reading.
EXTRA = {"genindex.html", "search.html", "py-modindex.html"}


def build(out: Path) -> None:
    """The documentation as HTML; a warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]


def test_everything_public_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"auto(?:function|class):: hip_hf\.(\w+)$", reference, re.MULTILINE))
    assert documented == set(hip_hf.__all__)


def check_all_are_there(seen: dict[Path, Seen], built: Path) -> None:
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    pages = {page.relative_to(built).as_posix() for page in seen}
    want = {f"{'notebooks/' * (source.suffix == '.ipynb')}{source.stem}.html" for source in sources}
    assert want <= pages
    assert len(want) >= 18
    linked = {link.partition("#")[0] for page in seen.values() for link in page.links}
    assert {page.as_uri() for page in seen if page.name not in EXTRA} <= linked  # none is lost


def check_none_is_broken(seen: dict[Path, Seen]) -> None:
    for page, shown in seen.items():
        assert (page.name, shown.broken_images) == (page.name, [])
        assert (page.name, shown.failed) == (page.name, [])
    assert broken_links(seen) == []
    books = [json.loads(book.read_text()) for book in (ROOT / "notebooks").glob("*.ipynb")]
    outputs = [output for book in books for cell in book["cells"] for output in cell.get("outputs", [])]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    figures = sum(page.count("_generated/") for page in pages) - 1  # models.md is text
    figures += sum(page.count("{image} ../benchmarks/results/") for page in pages)
    assert sum(len(page.images) for page in seen.values()) == drawn + figures >= 7


def check_contents(seen: dict[Path, Seen]) -> None:
    by_name = {page.name: shown for page, shown in seen.items()}
    for name in ("hip_attention", "HiPConfig", "HiPCache", "Raises", "configure"):
        assert name in by_name["api.html"].text
    models = by_name["models.html"].text
    assert "llama" in models
    assert "Types: refused" in models
    for page, picture in (("how", "tree.png"), ("how", "readings.png"), ("evaluation", "passkey.png"), ("index", "latency.png")):
        assert any(picture in source and own > 500 for source, own, _ in by_name[f"{page}.html"].images)


def test_pages(tmp_path: Path) -> None:
    """In one test, so that the pages are built once, whatever runs the tests."""
    built = tmp_path / "html"
    build(built)
    seen = {page: visit(page, tmp_path / "browser") for page in sorted(built.rglob("*.html"))}
    check_all_are_there(seen, built)
    check_none_is_broken(seen)
    check_contents(seen)
