"""`hip-hf lm-eval`: lm-eval's own command, which also knows `hip`, the tasks of hip_hf, and
presets for the benchmarks on the hub."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import typer

from hip_hf.cli.inputs import causes, network_error
from hip_hf.eval.reporting import report
from hip_hf.integration.lm_eval.registration import MODEL, UsageError, register

NO_LM_EVAL = "lm-eval is missing: pip install 'hip-hf[eval]'"
SUBCOMMANDS = ("ls", "validate")


@dataclass(frozen=True)
class Preset:
    """Arguments of lm-eval for a benchmark. Whatever the user gives as well wins."""

    tasks: tuple[str, ...]
    model_args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


# Prompts that are too long lose their middle, as these benchmarks prescribe, where lm-eval's model
# would cut the beginning.
_MIDDLE = {"prompt_truncation": "middle"}
TASK_PRESETS = {
    "longctx": Preset(("hip_longctx",)),
    "ruler": Preset(("ruler",), metadata={"max_seq_lengths": [4096, 8192, 16384, 32768]}),
    "longbench": Preset(("longbench",), _MIDDLE),
    "longbench-e": Preset(("longbench_e",), _MIDDLE),
    "longbench2": Preset(("longbench2",), _MIDDLE),
    "infinitebench": Preset(("infinitebench",), _MIDDLE),
    "babilong": Preset(("babilong_longctx",), metadata={"max_seq_lengths": "8k"}),
}


def arguments_for(arguments: Sequence[str]) -> list[str]:
    """Return lm-eval's arguments, made from those of `hip-hf lm-eval`: `--preset` becomes what it
    stands for, and the model type is `hip` if none is given. Raises UsageError if there is no such
    preset."""
    given = list(arguments)
    if given[:1] in ([name] for name in SUBCOMMANDS) or not given or given in (["-h"], ["--help"]):
        return given
    parser = argparse.ArgumentParser("hip-hf lm-eval", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", const="")
    asked, given = parser.parse_known_args(given[1:] if given[0] == "run" else given)
    for names in (("--model", "-M"), ("--tasks", "-t"), ("--config", "-C")):  # which stay
        parser.add_argument(*names, nargs="?", const="")
    own, _ = parser.parse_known_args(given)
    ahead: list[str] = []
    if asked.preset is not None:
        if asked.preset not in TASK_PRESETS:
            raise UsageError(f"--preset: got {asked.preset!r}, allowed: {' | '.join(TASK_PRESETS)}")
        preset = TASK_PRESETS[asked.preset]
        if preset.model_args and own.model not in (None, MODEL):
            why = f"allowed: {MODEL!r} ({', '.join(preset.model_args)} is its argument)"
            raise UsageError(f"--preset: got it with another model type than {MODEL!r}, {why}")
        if own.tasks is None:
            ahead += ["--tasks", *preset.tasks]
        # later ones are merged over these, key by key
        given_by = {"--model_args": preset.model_args, "--metadata": preset.metadata}
        for option, values in given_by.items():
            ahead += [option, json.dumps(values)] if values else []
    if own.model is None and own.config is None:
        ahead += ["--model", MODEL]
    return ["run", *ahead, *given]


def main(context: typer.Context) -> None:
    """lm-eval with the model type `hip` (the default here), our tasks (`hip_longctx`) and
    `--preset`; all else is lm-eval's."""
    try:
        register()
    except ImportError:
        raise SystemExit(NO_LM_EVAL) from None
    from lm_eval.__main__ import cli_evaluate

    try:
        arguments = arguments_for(context.args)
        if arguments in ([], ["-h"], ["--help"]):
            presets = f"--preset NAME: {' | '.join(TASK_PRESETS)}"
            others = "All other arguments are those of lm_eval:\n"
            report.notes.print(f"{presets}\n{others}", highlight=False)
            arguments = ["run", "--help"]
        sys.argv = ["lm-eval", *arguments]
        cli_evaluate()
    except ImportError as error:
        # a task's own extra: lm-eval says which; without that it is a fault
        if "install" not in str(error):
            raise
        raise SystemExit(f"hip-hf lm-eval: {' '.join(str(error).split())}") from None
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, UsageError):
                raise SystemExit(f"hip-hf lm-eval: {cause}") from None
        if (said := network_error(error)) is not None:
            where = "without a network use a local checkpoint and local tasks (--tasks hip_longctx)"
            line = f"cannot reach the Hugging Face Hub: {said}; {where}"
            raise SystemExit(f"hip-hf lm-eval: {line}") from None
        raise
