"""`hip-hf report`: one page of several saved results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from hip_hf.cli.inputs import user_errors
from hip_hf.cli.publish import check_file, write_file
from hip_hf.eval.reporting import page, plots
from hip_hf.eval.reporting.pictures import PICTURES

PAGE = Path("report.html")


def read_result(file: Path) -> dict[str, Any]:
    """A saved document. Raises ValueError if it cannot be read, or none of our commands wrote
    it."""
    allowed = f"what hip-hf {' | '.join(PICTURES)} --output has written"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"RESULTS: got {str(file)!r} ({error}), allowed: {allowed}") from None
    known = isinstance(document, dict) and document.get("command") in PICTURES
    if not known or not document.get("rows"):
        raise ValueError(f"RESULTS: got {str(file)!r}, allowed: {allowed}")
    return document


def main(
    results: Annotated[list[Path], Argument(help="Files that --output has written.")],
    output: Annotated[Path, Option(help="The HTML file, which needs no other.")] = PAGE,
    title: Annotated[str, Option(help="The page's title.")] = "hip-hf report",
) -> None:
    """Bundle tables and pictures of saved results in one HTML page."""
    plots.pyplot()
    with user_errors():
        check_file("--output", output)
        documents = [read_result(file) for file in results]
    drawn = [(document, PICTURES[document["command"]]) for document in documents]
    write_file(output, page.render(title, drawn))
