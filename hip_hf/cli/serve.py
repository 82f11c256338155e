"""`hip-hf serve`: Transformers' own OpenAI-compatible server, for a model that attends by `hip`."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from hip_hf.cli.inputs import cannot_load, parse_fields
from hip_hf.config import HiPConfig
from hip_hf.integration import serve as integration
from hip_hf.integration.api import configure
from hip_hf.integration.settings import NAMES

NO_SERVER = "hip-hf serve: the server is not installed (pip install 'hip-hf[serve]')"
# What Transformers' command has under these names is asked for otherwise: a model must be named,
# and attends by `hip`.
MODEL_OPTION, ATTN_OPTION = "force_model", "attn_implementation"
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="field=value of HiPConfig; may be repeated.")
]
Longest = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of a prompt and its answer; longer prompts are refused, longer answers end there.",
    ),
]


def main(set_: Settings = None, max_model_len: Longest = None, **options: Any) -> None:
    """Serve a model by OpenAI's API. This is Transformers' server; all options but the last two are
    its own."""
    if not is_serve_available():
        raise SystemExit(NO_SERVER)
    attn = options[ATTN_OPTION]
    fields = parse_fields(set_ or [])
    if fields and attn not in NAMES:
        raise typer.BadParameter(
            f"settings apply to --attn-implementation {' | '.join(NAMES)}, got {attn!r}",
            param_hint="--set",
        )

    def apply(model: Any) -> None:
        try:
            configure(model, **fields)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--set") from None

    try:
        HiPConfig.from_dict(fields)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
    try:
        integration.register()
    except ImportError as error:
        raise SystemExit(f"hip-hf serve: {error}") from None
    integration.limit_lengths(max_model_len)
    integration.explain_failures()
    if fields:
        integration.after_loading(apply)
    try:
        Serve(**options)
    except (OSError, ValueError) as error:
        raise cannot_load(f"{options[MODEL_OPTION]!r} with {attn!r}", error) from None


def _signature() -> inspect.Signature:
    """Parameters of Transformers' command, and the two of ours behind them."""
    model = Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint: a hub name or a folder.")
    ]
    changed: dict[str, dict[str, Any]] = {
        MODEL_OPTION: {"annotation": model, "default": inspect.Parameter.empty},
        ATTN_OPTION: {"default": "hip"},
    }
    theirs = [
        parameter
        for name, parameter in inspect.signature(Serve.__init__).parameters.items()
        if name != "self"
    ]
    own = [
        p
        for p in inspect.signature(main, eval_str=True).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    return inspect.Signature(
        [*(parameter.replace(**changed.get(parameter.name, {})) for parameter in theirs), *own]
    )


vars(main)["__signature__"] = _signature()
