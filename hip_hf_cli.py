"""The `hip-hf` command."""

# Beside the package, not inside: importing any module of `hip_hf` registers with Transformers, which takes seconds. What a
# command needs is imported when it runs.

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import typer
from typer.core import TyperGroup


@dataclass(frozen=True)
class Command:
    """A module of `hip_hf.cli` with a function `main`, and the first sentence of that function's docstring."""

    module: str
    help: str
    context: dict[str, Any] = field(default_factory=dict)


# its arguments, --help among them, are lm-eval's
_LM_EVAL = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
COMMANDS = {
    "doctor": Command(
        "doctor", "Try every kernel on this machine: what works, how fast, and what to set if something does not. Exit 1 if so."
    ),
    "demo": Command("demo", "Hide pass keys in a long document and ask for them: dense against pruned attention."),
    "generate": Command("generate", "Continue a prompt, greedily; timings and what each layer did go to the error stream."),
    "chat": Command("chat", "Answer questions about a document, which is read once: each answer costs its new tokens only."),
    "serve": Command(
        "serve",
        "Serve a model by OpenAI's API. This is Transformers' server; all options but the last two are its own.",
    ),
    "explain": Command("explain", "Run one prompt of random tokens through a checkpoint and show each layer's path."),
    "passkey": Command(
        "passkey",
        "Hide pass keys in long documents and count right answers, every layer and row sparse unless settings say otherwise.",
    ),
    "needles": Command(
        "needles",
        "Hide many pass keys in a document, ask for all in one forward pass, answers included, and count digits that are right.",
    ),
    "perplexity": Command(
        "perplexity", "Perplexity of a local text by position, every layer and row sparse unless settings say otherwise."
    ),
    "fidelity": Command(
        "fidelity", "Compare selections with the block oracle, layer by layer: captured mass, output error, and what they cost."
    ),
    "compare": Command(
        "compare", "Compare methods or settings on one checkpoint, every layer and row sparse unless settings say otherwise."
    ),
    "latency": Command(
        "latency", "Time one attention call against PyTorch's scaled_dot_product_attention, in prefill and in decode."
    ),
    "memory": Command(
        "memory", "Memory of a dynamic, a static, a paged and an offloaded cache (pools: an eighth, or what a step needs)."
    ),
    "kernels": Command(
        "kernels",
        "Compile every kernel for every GPU. Exit 1 if one spills, does not fit, or misses the tensor cores it should use.",
    ),
    "autoload": Command(
        "autoload",
        "Let plain lm_eval and transformers serve of this environment know `hip` (enable), stop that (disable), say how it is.",
    ),
    "report": Command("report_page", "Bundle tables and pictures of saved results in one HTML page."),
    "lm-eval": Command(
        "lm_eval",
        "lm-eval with the model type `hip` (the default here), our tasks (`hip_longctx`) and `--preset`; all else is lm-eval's.",
        _LM_EVAL,
    ),
}


class Commands(TyperGroup):
    """Lists its commands without importing them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name, with all its options."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load(name), rest


def load(name: str) -> Any:
    """The command with its options and arguments, which are those of its function."""
    command = COMMANDS[name]
    own = typer.Typer(add_completion=False)
    own.command(name, context_settings=command.context)(importlib.import_module(f"hip_hf.cli.{command.module}").main)
    return typer.main.get_command(own)


def _not_loaded() -> None:
    """Stands for every command in the list of commands."""


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)
for _name, _command in COMMANDS.items():
    app.command(_name, help=_command.help)(_not_loaded)


def main() -> None:
    """Entry point of the console script."""
    app()
