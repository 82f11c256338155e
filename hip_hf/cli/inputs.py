"""What several commands take: device, dtype, settings and files, and one line for the user where
one of them, or the network, is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hip_hf.config import HiPConfig
from hip_hf.eval.measure import documents
from hip_hf.integration.api import configure

# `auto`: as the checkpoint was saved.
WEIGHT_DTYPES = {
    "auto": "auto",
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# By name: the hub's client uses one HTTP library or another.
UNREACHED = {
    *(
        "ConnectionError",
        "ConnectError",
        "TimeoutError",
        "TimeoutException",
        "ConnectTimeout",
        "ReadTimeout",
        "ProxyError",
    ),
    *("LocalEntryNotFoundError", "OfflineModeIsEnabled"),
}
Device = Annotated[str, typer.Option("--device", help="cpu, cuda ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as saved), fp32, bf16 or fp16.")]
Sink = Annotated[int | None, typer.Option("--sink", help="First keys, always read.")]
Window = Annotated[int | None, typer.Option("--window", help="Latest keys, always read.")]


@contextmanager
def user_errors(option: str | None = None, before: str = "", after: str = "") -> Iterator[None]:
    """One line instead of a traceback for a ValueError or OSError inside: the user got something
    wrong, maybe an `option`. `before` and `after` are said around the error's own words."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{before}{error}{after}", param_hint=option) from None


def check_device(device: str) -> torch.device:
    """The device; one line for a name that there is not."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(
            f"got {device!r} ({reason}), allowed: a device of this machine", param_hint="--device"
        ) from None


def check_dtype(dtype: str) -> Any:
    """The dtype that `load` takes; one line for another name."""
    if dtype not in WEIGHT_DTYPES:
        raise typer.BadParameter(
            f"got {dtype!r}, allowed: {' | '.join(WEIGHT_DTYPES)}", param_hint="--dtype"
        )
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
        if names & UNREACHED or (
            isinstance(cause, OSError) and "couldn't connect to" in str(cause)
        ):
            return (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return None


def cannot_load(what: str, error: Exception) -> typer.BadParameter:
    """One line for a checkpoint that cannot be loaded; a missing network is named as such."""
    if (said := network_error(error)) is not None:
        where = "without a network use the folder of a checkpoint"
        return typer.BadParameter(
            f"cannot reach the Hugging Face Hub for {what}: {said}; {where}", param_hint="MODEL"
        )
    return typer.BadParameter(
        f"cannot load {what}: {' '.join(str(error).split())}", param_hint="MODEL"
    )


def read_text(file: Path, option: str) -> str:
    """The text of the file that an option names; one line for a file that is missing, no text or
    empty."""
    with user_errors(option, f"cannot read {str(file)!r}: "):
        text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise typer.BadParameter(f"{str(file)!r} is empty", param_hint=option)
    return text


def tokens_of(tokenizer: Any, text: str, file: Path, option: str) -> list[int]:
    """The token ids of a file's text, with those that the tokenizer puts around it; one line where
    there are none."""
    ids = tokenizer(text, verbose=False).input_ids
    if not ids:
        raise typer.BadParameter(f"{str(file)!r} holds no token for this model", param_hint=option)
    return ids


def check_length(tokens: int, ids: list[int], document: Path) -> None:
    """One line for a document of fewer tokens than are asked for."""
    if len(ids) < tokens:
        raise typer.BadParameter(
            f"--tokens: got {tokens}, allowed: at most the {len(ids)} of {document.name}"
        )


def load_to_measure(model: str, device: str, text: str, dtype: str) -> tuple[Any, Any, list[int]]:
    """What a measuring command begins with: the model on its device, dense at first, its tokenizer,
    and the text's tokens. Raises typer.BadParameter if there is no such device or dtype, or the
    model cannot be loaded."""
    where, weights = check_device(device), check_dtype(dtype)
    try:
        loaded, tokenizer = documents.load(model, "sdpa", weights)
    except (OSError, ValueError) as error:
        raise cannot_load(repr(model), error) from None
    return (
        loaded.to(where),
        tokenizer,
        tokenizer.encode(text, add_special_tokens=False, verbose=False),
    )


def parse_fields(pairs: list[str]) -> dict[str, Any]:
    """`field=value` settings; values are JSON where they can be read as such, else text."""
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(
                f"got {pair!r}, allowed: field=value, such as budget=512", param_hint="--set"
            )
        try:
            fields[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[name.strip()] = value.strip()
    return fields


def load(
    checkpoint: str, attn: str, fields: dict[str, Any], dtype: str = "auto"
) -> tuple[Any, Any, HiPConfig]:
    """Model, tokenizer and the settings that hold; one line instead of a traceback for what a user
    can get wrong."""
    weights = check_dtype(dtype)
    try:
        model, tokenizer = documents.load(checkpoint, attn, weights)
    except (OSError, ValueError) as error:
        raise cannot_load(f"{checkpoint!r} with {attn!r}", error) from None
    with user_errors("--set"):
        return model, tokenizer, configure(model, **fields)
