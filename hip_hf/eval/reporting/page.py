"""A page of results that needs no other file: tables and pictures in one HTML file, made from saved
JSON documents."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from hip_hf.eval.reporting import report

# Shown at the head of a section or below its table; everything else of a document is listed as a
# detail.
SHOWN = ("command", "title", "rows", "machine")
Draw = Callable[[dict[str, Any], Path], None]


def picture(document: dict[str, Any], draw: Draw) -> str:
    """The picture of a document as a `data:` address."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        draw(document, file)
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def section(document: dict[str, Any], draw: Draw) -> dict[str, Any]:
    """What the template needs of one document."""
    rows, machine = document["rows"], document["machine"].items()
    names = list(dict.fromkeys(name for row in rows for name in row))
    others = {name: value for name, value in document.items() if name not in SHOWN}
    return {
        "title": document["title"],
        "command": document["command"],
        "names": [name.replace("_", " ") for name in names],
        "rows": [[report.cell(row.get(name)) for name in names] for row in rows],
        "words": [all(isinstance(row.get(name), str) for row in rows) for name in names],
        "picture": picture(document, draw),
        "details": {name: json.dumps(value, indent=1) for name, value in others.items()},
        "machine": ", ".join(f"{name} {value}" for name, value in machine if value is not None),
    }


def render(title: str, documents: Sequence[tuple[dict[str, Any], Draw]]) -> str:
    """The page: a section for each (document, function that draws it)."""
    loader = PackageLoader("hip_hf.eval.reporting", ".")
    page = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    sections = [section(*pair) for pair in documents]
    return page.get_template("page.html").render(title=title, sections=sections)
