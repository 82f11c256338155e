"""`hip-hf lm-eval`: lm-eval's own command, which knows `hip`, our tasks, and presets for the benchmarks on the hub."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import typer

from hip_hf.cli.network import causes, network_error
from hip_hf.eval.reporting import report
from hip_hf.integration.lm_eval.registration import MODEL, UsageError, register

MISSING = "lm-eval is missing: pip install 'hip-hf[eval]'"
SUBCOMMANDS = ("ls", "validate")


@dataclass(frozen=True)
class Preset:
    """Arguments of lm-eval for a benchmark. Whatever the user gives as well wins."""

    tasks: tuple[str, ...]
    model_args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


# Prompts that are too long lose their middle, as these benchmarks prescribe, where lm-eval's model would cut the beginning.
_MIDDLE = {"prompt_truncation": "middle"}
PRESETS = {
    "longctx": Preset(("hip_longctx",)),
    "ruler": Preset(("ruler",), metadata={"max_seq_lengths": [4096, 8192, 16384, 32768]}),
    "longbench": Preset(("longbench",), _MIDDLE),
    "longbench-e": Preset(("longbench_e",), _MIDDLE),
    "longbench2": Preset(("longbench2",), _MIDDLE),
    "infinitebench": Preset(("infinitebench",), _MIDDLE),
    "babilong": Preset(("babilong_longctx",), metadata={"max_seq_lengths": "8k"}),
}


def gives(arguments: Sequence[str], *names: str) -> bool:
    """Whether one of the options is among the arguments, as `--name value` or `--name=value`."""
    return any(argument == name or argument.startswith(f"{name}=") for argument in arguments for name in names)


def arguments_for(arguments: Sequence[str]) -> list[str]:
    """lm-eval's arguments from ours: `--preset` replaced by what it stands for, and the model type `hip` where none is given.

    Raises:
        UsageError: there is no such preset.
    """
    given = list(arguments)
    if given[:1] in ([name] for name in SUBCOMMANDS) or not given or given in (["-h"], ["--help"]):
        return given
    given = given[1:] if given[0] == "run" else given
    ahead: list[str] = []
    preset = _take_preset(given)
    if preset is not None:
        if preset.model_args and gives(given, "--model", "-M") and not _is_ours(given):
            names = ", ".join(preset.model_args)
            raise UsageError(
                f"--preset: got it with another model type than {MODEL!r}, allowed: {MODEL!r} ({names} is its argument)"
            )
        if not gives(given, "--tasks", "-t"):
            ahead += ["--tasks", *preset.tasks]
        # later ones are merged over these, key by key
        for option, values in (("--model_args", preset.model_args), ("--metadata", preset.metadata)):
            ahead += [option, json.dumps(values)] if values else []
    if not gives(given, "--model", "-M", "--config", "-C"):
        ahead += ["--model", MODEL]
    return ["run", *ahead, *given]


def _is_ours(given: Sequence[str]) -> bool:
    return f"--model={MODEL}" in given or any(
        name in ("--model", "-M") and value == MODEL for name, value in itertools.pairwise(given)
    )


def _take_preset(given: list[str]) -> Preset | None:
    """The preset named in the arguments, which lose it."""
    for at, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name != "--preset":
            continue
        if not equals:
            value = given[at + 1] if at + 1 < len(given) else ""
        if value not in PRESETS:
            raise UsageError(f"--preset: got {value!r}, allowed: {' | '.join(PRESETS)}")
        del given[at : at + (1 if equals else 2)]
        return PRESETS[value]
    return None


def usage_error(error: BaseException) -> str | None:
    """What the user got wrong, if that is why this was raised."""
    return next((str(cause) for cause in causes(error) if isinstance(cause, UsageError)), None)


def main(context: typer.Context) -> None:
    """lm-eval with the model type `hip` (the default here), our tasks (`hip_longctx`) and `--preset`; all else is lm-eval's."""
    try:
        register()
    except ImportError:
        raise SystemExit(MISSING) from None
    from lm_eval.__main__ import cli_evaluate

    try:
        arguments = arguments_for(context.args)
        if arguments in ([], ["-h"], ["--help"]):
            report.notes.print(
                f"--preset NAME: {' | '.join(PRESETS)}\nAll other arguments are those of lm_eval:\n", highlight=False
            )
            arguments = ["run", "--help"]
        sys.argv = ["lm-eval", *arguments]
        cli_evaluate()
    except ImportError as error:
        # a task's own extra: lm-eval says which; without that it is a fault
        if "install" not in str(error):
            raise
        raise SystemExit(f"hip-hf lm-eval: {' '.join(str(error).split())}") from None
    except Exception as error:
        if (said := usage_error(error)) is not None:
            raise SystemExit(f"hip-hf lm-eval: {said}") from None
        if (said := network_error(error)) is not None:
            where = "without a network use a local checkpoint and local tasks (--tasks hip_longctx)"
            raise SystemExit(f"hip-hf lm-eval: cannot reach the Hugging Face Hub: {said}; {where}") from None
        raise
