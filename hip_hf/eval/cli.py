"""The `hip-hf` command."""

from __future__ import annotations

import typer

from hip_hf.eval import (
    autoload,
    bundle,
    compare,
    demo,
    explain,
    fidelity,
    generate,
    harness,
    kernels,
    latency,
    memory,
    needles,
    passkey,
    perplexity,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)
for module in (demo, generate, explain, passkey, needles, perplexity, fidelity, compare, latency, memory, kernels, autoload):
    app.command(module.__name__.rpartition(".")[2])(module.main)
app.command("report")(bundle.main)
# its arguments, --help among them, are lm-eval's
lm_eval_context = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("lm-eval", context_settings=lm_eval_context)(harness.main)


def main() -> None:
    """Entry point of the console script."""
    app()
