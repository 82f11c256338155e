"""The `hip-hf` command."""

from __future__ import annotations

import typer

from hip_hf.eval import demo, explain, fidelity, generate, latency, memory, passkey

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)
for module in (demo, generate, explain, passkey, fidelity, latency, memory):
    app.command(module.__name__.rpartition(".")[2])(module.main)


def main() -> None:
    """Entry point of the console script."""
    app()
