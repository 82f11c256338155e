"""The `hip-hf` command."""

# Beside the package, not inside: importing any module of `hip_hf` registers with Transformers,
# which takes seconds. What a command needs is imported when it runs.

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup


@dataclass(frozen=True)
class Command:
    """A module of `hip_hf.cli` with a function `main`."""

    module: str
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def help(self) -> str:
        """The first line of the docstring of `main`: the module is read, not imported."""
        package = find_spec("hip_hf")
        assert package is not None
        assert package.submodule_search_locations is not None
        file = Path(package.submodule_search_locations[0]) / "cli" / f"{self.module}.py"
        code = ast.parse(file.read_text(encoding="utf-8"))
        (main,) = (x for x in code.body if isinstance(x, ast.FunctionDef) and x.name == "main")
        return (ast.get_docstring(main) or "").partition("\n")[0]


NAMED_ALIKE = (
    *("doctor", "demo", "generate", "chat", "serve", "explain", "passkey", "needles", "perplexity"),
    *("fidelity", "compare", "latency", "memory", "kernels", "autoload"),
)
# its arguments, --help among them, are lm-eval's
LM_EVAL = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
COMMANDS = {name: Command(name) for name in NAMED_ALIKE}
COMMANDS |= {"report": Command("report_page"), "lm-eval": Command("lm_eval", LM_EVAL)}


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
    own.command(name, context_settings=command.context)(
        importlib.import_module(f"hip_hf.cli.{command.module}").main
    )
    return typer.main.get_command(own)


def _not_loaded() -> None:
    """Stands for every command in the list of commands."""


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help=__doc__,
)
for _name, _command in COMMANDS.items():
    app.command(_name, help=_command.help)(_not_loaded)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
