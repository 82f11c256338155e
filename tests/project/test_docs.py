"""The documentation: built without a warning, every page shown by a browser, no broken image, file
or link."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import figures
import pytest
from browser import Seen, broken_links, visit
from repository import ROOT

import hip_hf
from hip_hf.eval.measure.costs import prompt_cost
from hip_hf.methods.base import method_of
from hip_hf.methods.need import Options
from hip_hf.registry import METHODS

if not os.environ.get("CI"):  # where it must have run
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    pytest.importorskip("myst_nb", reason="pip install '.[docs]'")

DOCS = ROOT / "docs"

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Made by Sphinx beside the pages, and nowhere linked as reading.
EXTRA = {"genindex.html", "search.html", "py-modindex.html"}


def build(out: Path) -> None:
    """The documentation as HTML; a warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_everything_public_is_in_the_reference() -> None:
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = set(
        re.findall(r"auto(?:function|class):: hip_hf\.(\w+)$", reference, re.MULTILINE)
    )
    assert documented == set(hip_hf.__all__)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_every_page_is_written_where_it_stands() -> None:
    """None is cut out of another by the text of a heading."""
    cut = re.compile("start-after|end-before|README.md$", re.MULTILINE)
    assert [
        page.name for page in DOCS.glob("*.md") if cut.search(page.read_text(encoding="utf-8"))
    ] == []


def test_every_file_that_a_page_names_is_there() -> None:
    places = (ROOT, ROOT / "hip_hf", ROOT / "benchmarks" / "results")
    named = set()
    for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
        text = re.sub(
            r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        )
        named |= set(re.findall(r"`([\w.-]+/[\w/.-]+\.\w+|\w+\.json)`", text))
    assert len(named) > 50
    assert (
        sorted(name for name in named if not any((place / name).exists() for place in places)) == []
    )


@pytest.mark.parametrize("kind", [hip_hf.HiPConfig, Options], ids=lambda kind: kind.__name__)
def test_all_settings_are_documented_with_their_defaults(kind: type) -> None:
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", page, re.MULTILINE))
    defaults = kind()
    for field in dataclasses.fields(kind):
        assert documented.get(field.name) == str(getattr(defaults, field.name)), (
            f"docs/settings.md: `{field.name}`"
        )


def test_what_pages_say_of_the_defaults_is_true() -> None:
    """Numbers in sentences that follow from the settings."""
    defaults = hip_hf.HiPConfig()
    costs = [prompt_cost(defaults, tokens) for tokens in (8192, 32768, 131072)]
    ratios = [f"{cost.selection / cost.attention:.2f}" for cost in costs if cost is not None]
    short, medium, long = ratios
    products = "of attention's products"
    said = {
        "docs/measurements.md": [f"takes {medium} and {long} of attention's FLOPs"],
        "docs/decisions.md": [
            f"takes {medium} and {long} {products} over prompts of 32K and 128K",
            f"takes {short} {products} at 8K, {medium} at 32K and {long} at 128K",
        ],
        "docs/how.md": [
            f"({defaults.start_blocks} blocks by default, in contexts",
            f"keeps ({defaults.start_blocks} blocks by default)",
            f"(`rescore`; {defaults.rescore_blocks} blocks by default)",
        ],
        "docs/serving.md": [f"to {defaults.sparse_reach:,} keys"],
    }
    for page, sentences in said.items():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert [sentence for sentence in sentences if sentence not in text] == [], page


def test_every_method_is_in_what_pages_list() -> None:
    """The complete lists are generated. The README names methods by hand: all of those exist."""
    assert [name for name in METHODS if f"| `{name}` |" not in figures.methods()] == []
    refusing = [name for name in METHODS if not method_of(name).extends]
    assert re.findall(r"`(\w+)`", figures.not_extending()) == refusing
    for page in ("methods", "extension"):
        assert "```{include} _generated/" in (DOCS / f"{page}.md").read_text(encoding="utf-8")
    words = " ".join(README.split())
    (sentence,) = re.findall(r"besides `hip` there are (.+?), with the same", words)
    named = re.findall(r"`(\w+)`", sentence)
    assert len(named) > 5
    assert set(named) <= METHODS.keys()


def check_all_are_there(seen: dict[Path, Seen], built: Path) -> None:
    sources = [*DOCS.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
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
    outputs = [
        output for book in books for cell in book["cells"] for output in cell.get("outputs", [])
    ]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    pages = [page.read_text() for page in DOCS.glob("*.md")]
    shown_in = r"_generated/\w+\.png|(?:\{image\} |\]\()\.\./benchmarks/results/\w+\.png"
    pictures = sum(len(re.findall(shown_in, page)) for page in pages)
    assert sum(len(page.images) for page in seen.values()) == drawn + pictures >= 7


def check_contents(seen: dict[Path, Seen]) -> None:
    by_name = {page.name: shown for page, shown in seen.items()}
    for name in ("hip_attention", "HiPConfig", "HiPCache", "Raises", "configure"):
        assert name in by_name["api.html"].text
    models = by_name["models.html"].text
    assert "llama" in models
    assert "Types: refused" in models
    for page, picture in (
        ("how", "tree.png"),
        ("how", "readings.png"),
        ("evaluation", "passkey.png"),
        ("index", "latency.png"),
    ):
        assert any(
            picture in source and own > 500 for source, own, _ in by_name[f"{page}.html"].images
        )


def test_pages(tmp_path: Path) -> None:
    """In one test, so that the pages are built once, whatever runs the tests."""
    built = tmp_path / "html"
    build(built)
    seen = {page: visit(page, tmp_path / "browser") for page in sorted(built.rglob("*.html"))}
    check_all_are_there(seen, built)
    check_none_is_broken(seen)
    check_contents(seen)
