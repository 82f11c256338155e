"""How the measuring commands hand over their results: a table or JSON, a result file, a picture, a
page of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from hip_hf.config import HiPConfig
from hip_hf.eval.measure.documents import CHECKPOINT
from hip_hf.eval.reporting import page, plots, report
from hip_hf.eval.reporting.pictures import PICTURES
from hip_hf.eval.reporting.resumable import Resumable

# What results call the checkpoint that comes with the package.
DEMO = "the demo checkpoint"

Json = Annotated[bool, Option("--json", help="Print one JSON document instead of tables or text.")]
_OUTPUT = (
    "Write the JSON document to this file. If interrupted, the same command goes on from there."
)
Output = Annotated[Path | None, Option("--output", help=_OUTPUT)]
Plot = Annotated[Path | None, Option("--plot", help="Draw the results into this PNG file.")]
_REPORT = "Write table and picture to this HTML file, which needs no other."
ReportFile = Annotated[Path | None, Option("--report", help=_REPORT)]


def model_name(model: str) -> str:
    """How results name a model: not by where the demo checkpoint happens to be installed."""
    return DEMO if model == str(CHECKPOINT) else model


def measured_on(
    model: str, document: Path | str, dtype: str, configs: dict[str, HiPConfig], **own: Any
) -> dict[str, Any]:
    """What a result says it was measured on and with; `document`: a file or a name; `own`: what
    else its command was given."""
    settings = {name: config.to_dict() for name, config in configs.items()}
    where = {"model": model_name(model), "document": Path(document).name}
    return {**where, "dtype": dtype, **own, "configs": settings}


def check_file(option: str, file: Path | None) -> None:
    """Raise ValueError, before the work, for a file that could not be written after it."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"{option}: got {str(file)!r}, allowed: a file in a folder that exists")


def write_file(file: Path, text: str) -> None:
    """Write a whole file or none of it."""
    part = file.with_name(file.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


@dataclass(frozen=True)
class Targets:
    """Where the results go, as the options say. Raises ValueError if one of the files could not be
    written, and SystemExit if matplotlib is missing, and there is something to draw."""

    as_json: bool = False
    output: Path | None = None
    plot: Path | None = None
    report: Path | None = None

    def __post_init__(self) -> None:
        for option in ("output", "plot", "report"):
            check_file(f"--{option}", getattr(self, option))
        if self.plot is not None or self.report is not None:
            plots.pyplot()

    def kept(self, command: str, **request: Any) -> Resumable:
        """The finished measurements of this request, on this machine."""
        return Resumable(self.output, {"command": command, **request, "machine": report.machine()})

    def publish(
        self,
        command: str,
        title: str,
        rows: Sequence[dict[str, Any]],
        details: dict[str, Any],
        kept: Resumable | None = None,
        tables: Mapping[str, Sequence[dict[str, Any]]] | None = None,
        draw: page.Draw | None = None,
    ) -> dict[str, Any]:
        """Show what a command measured and write its files; the JSON document.

        Args:
            rows: with the same keys.
            details: what holds for all rows (`model` among them).
            kept: the finished measurements, which are not needed any more.
            tables: `{title: rows}`, shown to people instead of all rows.
            draw: makes the picture from the document, for what `PICTURES` has none of.
        """
        document = {"command": command, "title": title, "rows": list(rows), **details}
        document |= {"machine": report.machine()}
        draw, text = draw or PICTURES.get(command), json.dumps(document, indent=1)
        if self.output is not None:
            write_file(self.output, text + "\n")
        if self.plot is not None and draw is not None:
            draw(document, self.plot)
        if self.report is not None and draw is not None:
            write_file(self.report, page.render(title, [(document, draw)]))
        if kept is not None:
            kept.finish()
        if self.as_json:
            print(text)
        else:
            for heading, shown in (tables or {title: rows}).items():
                report.show(heading, shown, False)
        return document
