"""`hip-hf serve`: Transformers' own OpenAI-compatible server, for a model that attends by `hip`."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from hip_hf.cli.inputs import SetFields, loading, parse_fields, user_errors
from hip_hf.config import HiPConfig
from hip_hf.integration import serve as integration
from hip_hf.integration.api import configure
from hip_hf.integration.settings import NAMES

NO_SERVER = "hip-hf serve: the server is not installed (pip install 'hip-hf[serve]')"
# What Transformers' command has under these names is asked for otherwise: a model must be named,
# and attends by `hip`.
MODEL_OPTION, ATTN_OPTION = "force_model", "attn_implementation"
_LENGTH = "Tokens of a prompt and its answer; longer prompts are refused, longer answers end there."
Longest = Annotated[int | None, typer.Option(min=2, help=_LENGTH)]


def main(set_: SetFields = None, max_model_len: Longest = None, **options: Any) -> None:
    """Serve a model by OpenAI's API. This is Transformers' server; all options but the last two are
    its own."""
    if not is_serve_available():
        raise SystemExit(NO_SERVER)
    attn = options[ATTN_OPTION]
    fields = parse_fields(set_)
    if fields and attn not in NAMES:
        line = f"settings apply to --attn-implementation {' | '.join(NAMES)}, got {attn!r}"
        raise typer.BadParameter(line, param_hint="--set")

    def apply(model: Any) -> None:
        with user_errors("--set"):
            configure(model, **fields)

    with user_errors("--set"):
        HiPConfig.from_dict(fields)
    try:
        integration.register()
    except ImportError as error:
        raise SystemExit(f"hip-hf serve: {error}") from None
    integration.limit_lengths(max_model_len)
    integration.explain_failures()
    if fields:
        integration.after_loading(apply)
    with loading(f"{options[MODEL_OPTION]!r} with {attn!r}"):
        Serve(**options)


def _signature() -> inspect.Signature:
    """Return the parameters of Transformers' command, followed by the two of `main`."""
    argument = typer.Argument(metavar="MODEL", help="Checkpoint: a hub name or a folder.")
    changed: dict[str, dict[str, Any]] = {
        MODEL_OPTION: {"annotation": Annotated[str, argument], "default": inspect.Parameter.empty},
        ATTN_OPTION: {"default": "hip"},
    }
    _, *others = inspect.signature(Serve.__init__).parameters.values()  # but `self`
    *own, _ = inspect.signature(main, eval_str=True).parameters.values()  # but `options`
    return inspect.Signature([*(p.replace(**changed.get(p.name, {})) for p in others), *own])


vars(main)["__signature__"] = _signature()
