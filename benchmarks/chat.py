"""A conversation of the real model about 8K tokens of the shipped novel, as `hip-hf chat` shows it,
into a text file.

`python benchmarks/chat.py [FILE]`: seconds are the processor's, on one thread, so that what else
the machine does counts less.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging
from typer.testing import CliRunner

from hip_hf.eval.measure import documents, real_model
from hip_hf.eval.reporting import report
from hip_hf_cli import app

FILE = Path(__file__).parent / "results" / "chat.txt"
TOKENS, NEW_TOKENS = 7900, 32  # the model was trained for 8,192, and the conversation needs some
QUESTIONS = (
    "Who is Elizabeth?",
    "Why does Sir Walter leave Kellynch Hall?",
    "Where do they move to?",
)


def main(file: Path) -> None:
    """Write the screen of the command, and the machine below it."""
    real_model.fetch()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    time.perf_counter = time.process_time  # what the command measures with
    asked = [word for question in QUESTIONS for word in ("--question", question)]
    sizes = ["--tokens", str(TOKENS), "--max-new-tokens", str(NEW_TOKENS)]
    arguments = [
        "chat",
        str(real_model.FOLDER),
        "--document",
        documents.DOCUMENT.name,
        *sizes,
        *asked,
    ]
    shown = CliRunner(env={"COLUMNS": "130", "TERM": "dumb"}).invoke(
        app,
        [
            str(documents.DOCUMENT) if word == documents.DOCUMENT.name else word
            for word in arguments
        ],
        catch_exceptions=False,
    )
    machine = ", ".join(
        f"{name} {value}" for name, value in report.machine().items() if value is not None
    )
    file.write_text(
        f"$ hip-hf {shlex.join(arguments)}\n{shown.output.strip()}\n\n"
        f"({machine}; processor seconds)\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FILE)
