"""What several commands take: model, device, dtype, settings and files, and one line for the user
where one of them, or the network, is not there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Argument, BadParameter, Option

from hip_hf.config import HiPConfig
from hip_hf.eval.measure import documents
from hip_hf.integration.api import configure

# `auto`: as the checkpoint was saved.
WEIGHT_DTYPES = dict(auto="auto", fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# By name: the hub's client uses one HTTP library or another.
UNREACHED = {
    *("ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "TimeoutError"),
    *("TimeoutException", "ProxyError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"),
}
# Options and arguments that several commands have alike.
Model = Annotated[str, Argument(help="Hub name or folder; default: the shipped demo checkpoint.")]
Checkpoint = Annotated[str, Argument(help="Checkpoint: a hub name or a folder.")]
Device = Annotated[str, Option("--device", help="cpu, cuda ...")]
Dtype = Annotated[str, Option("--dtype", help="auto (as saved), fp32, bf16 or fp16.")]
Sink = Annotated[int | None, Option("--sink", help="First keys, always read.")]
Window = Annotated[int | None, Option("--window", help="Latest keys, always read.")]
Budget = Annotated[int | None, Option(help="Keys selected per query block.")]
Budgets = Annotated[str, Option(help="Every setting with each of these budgets, like 256,512.")]
SetFields = Annotated[
    list[str] | None, Option("--set", help="field=value of HiPConfig; may be repeated.")
]


def fact_count(help_text: str) -> Any:
    """The option of how many pass keys are hidden: each command words the help itself."""
    return Option(min=1, max=len(documents.FACT_NAMES), help=help_text)


@contextmanager
def user_errors(option: str | None = None, before: str = "", after: str = "") -> Iterator[None]:
    """One line instead of a traceback for a ValueError or OSError inside: the user got something
    wrong, maybe an `option`. `before` and `after` are said around the error's own words."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BadParameter(f"{before}{error}{after}", param_hint=option) from None


def not_allowed(option: str, got: object, allowed: str | Iterable[str]) -> BadParameter:
    """One line for what an option must not be; `allowed`: words, or the names that it may be."""
    words = allowed if isinstance(allowed, str) else " | ".join(allowed)
    return BadParameter(f"got {got!r}, allowed: {words}", param_hint=option)


def check_device(device: str) -> torch.device:
    """The device; one line for a name that there is not."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        line = f"got {device!r} ({str(error).splitlines()[0]}), allowed: a device of this machine"
        raise BadParameter(line, param_hint="--device") from None


def check_dtype(dtype: str) -> Any:
    """The dtype that `documents.load` takes; one line for another name."""
    if dtype not in WEIGHT_DTYPES:
        raise not_allowed("--dtype", dtype, WEIGHT_DTYPES)
    return WEIGHT_DTYPES[dtype]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def network_error(error: BaseException) -> str | None:
    """What could not be reached, if that is why this was raised."""
    for cause in causes(error):
        names = {kind.__name__ for kind in type(cause).__mro__}
        # Transformers reports it as a plain OSError, whose text is all there is to tell
        plain = isinstance(cause, OSError) and "couldn't connect to" in str(cause)
        if plain or names & UNREACHED:
            return (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return None


@contextmanager
def loading(what: str) -> Iterator[None]:
    """One line for a checkpoint that cannot be loaded inside; a missing network is named as
    such."""
    try:
        yield
    except (OSError, ValueError) as error:
        line = f"cannot load {what}: {' '.join(str(error).split())}"
        if (said := network_error(error)) is not None:
            where = "without a network use the folder of a checkpoint"
            line = f"cannot reach the Hugging Face Hub for {what}: {said}; {where}"
        raise BadParameter(line, param_hint="MODEL") from None


def read_text(file: Path, option: str) -> str:
    """The text of the file that an option names; one line for a file that is missing, no text or
    empty."""
    with user_errors(option, f"cannot read {str(file)!r}: "):
        text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise BadParameter(f"{str(file)!r} is empty", param_hint=option)
    return text


def tokens_of(tokenizer: Any, text: str, file: Path, option: str) -> list[int]:
    """The token ids of a file's text, with those that the tokenizer puts around it; one line where
    there are none."""
    ids = tokenizer(text, verbose=False).input_ids
    if not ids:
        raise BadParameter(f"{str(file)!r} holds no token for this model", param_hint=option)
    return ids


def check_length(tokens: int, ids: list[int], document: Path) -> None:
    """One line for a document of fewer tokens than are asked for."""
    if len(ids) < tokens:
        raise not_allowed("--tokens", tokens, f"at most the {len(ids)} of {document.name}")


def load_to_measure(model: str, device: str, text: str, dtype: str) -> tuple[Any, Any, list[int]]:
    """What a measuring command begins with: the model on its device, dense at first, its tokenizer,
    and the text's tokens. Raises typer.BadParameter if there is no such device or dtype, or the
    model cannot be loaded."""
    where, weights = check_device(device), check_dtype(dtype)
    with loading(repr(model)):
        loaded, tokenizer = documents.load(model, "sdpa", weights)
    return loaded.to(where), tokenizer, documents.encode(tokenizer, text)


def parse_fields(pairs: list[str] | None) -> dict[str, Any]:
    """`field=value` settings; values are JSON where they can be read as such, else text."""
    fields = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise not_allowed("--set", pair, "field=value, such as budget=512")
        try:
            fields[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[name.strip()] = value.strip()
    return fields


def load_or_exit(
    checkpoint: str, attn: str, fields: dict[str, Any], dtype: str = "auto"
) -> tuple[Any, Any, HiPConfig]:
    """Model, tokenizer and the settings that hold; one line instead of a traceback for what a user
    can get wrong."""
    weights = check_dtype(dtype)
    with loading(f"{checkpoint!r} with {attn!r}"):
        model, tokenizer = documents.load(checkpoint, attn, weights)
    with user_errors("--set"):
        return model, tokenizer, configure(model, **fields)
