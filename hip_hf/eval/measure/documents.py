"""The demo checkpoint, and documents with hidden facts: what the demo, the pass-key test and training share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hip_hf.eval.measure.network import network_error

ASSETS = Path(__file__).parents[2] / "assets"
CHECKPOINT = ASSETS / "checkpoint"
DOCUMENT = ASSETS / "document.txt"  # held out from training

# `auto`: as the checkpoint was saved.
DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Device = Annotated[str, typer.Option("--device", help="cpu, cuda ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as saved), fp32, bf16 or fp16.")]

NAMES = [
    "amber", "anchor", "apple", "arrow", "badger", "banjo", "basil", "beacon", "birch", "bison", "bronze", "cactus",
    "camel", "canyon", "cedar", "cobalt", "comet", "copper", "coral", "cricket", "dragon", "ember", "falcon", "fern",
    "fiddle", "ginger", "glacier", "granite", "harbor", "hazel", "heron", "indigo", "iris", "ivory", "jade", "jasper",
    "kettle", "lantern", "lemon", "lotus", "magnet", "maple", "marble", "meteor", "mint", "nickel", "olive", "onyx",
    "orchid", "otter", "panda", "pearl", "pepper", "pigeon", "quartz", "raven", "saffron", "salmon", "tiger", "topaz",
    "tulip", "velvet", "walnut", "zebra",
]  # fmt: skip
DIGITS = 5


@dataclass(frozen=True)
class Fact:
    """A pass key hidden in a document at `depth`, 0 (its beginning) to 1 (its end)."""

    name: str
    key: str
    depth: float


def note(name: str, key: str) -> str:
    """The sentence that hides a fact."""
    return f"\nThe pass key of {name} is {key}. Remember it.\n"


def question(name: str) -> str:
    """The question, up to where the answer begins."""
    return f"\nWhat is the pass key of {name}? The pass key of {name} is"


def hide(tokenizer: Any, text: list[int], length: int, facts: list[Fact], end: list[int]) -> list[int]:
    """A document of exactly `length` tokens: `text` (token ids) with the facts hidden in it, and `end` (token ids) after it.

    Raises:
        ValueError: `text` is too short, or notes and `end` alone are longer than `length`.
    """
    encode = lambda string: tokenizer.encode(string, add_special_tokens=False)  # noqa: E731
    notes = [(fact.depth, encode(note(fact.name, fact.key))) for fact in sorted(facts, key=lambda fact: fact.depth)]
    room = length - len(end) - sum(len(ids) for _, ids in notes)
    if not 0 <= room <= len(text):
        raise ValueError(f"length: got {length}, allowed: {length - room} (notes and question) to {length - room + len(text)}")
    prompt: list[int] = []
    read = 0
    for depth, ids in notes:
        upto = round(depth * room)
        prompt += text[read:upto] + ids
        read = upto
    return prompt + text[read:room] + end


def make_prompt(tokenizer: Any, text: list[int], length: int, facts: list[Fact], ask: str) -> list[int]:
    """A document of exactly `length` tokens: `text` (token ids) with the facts hidden in it, and the question at its end.

    Raises:
        ValueError: `text` is too short, or notes and question alone are longer than `length`.
    """
    return hide(tokenizer, text, length, facts, tokenizer.encode(question(ask), add_special_tokens=False))


def answer_of(tokenizer: Any, ids: torch.Tensor | list[int]) -> str:
    """The digits that generated tokens begin with."""
    text = tokenizer.decode(ids).strip()
    digits = ""
    for char in text:
        if not char.isdigit():
            break
        digits += char
    return digits


def digest(text: str) -> str:
    """A name for a text that another text does not have."""
    return hashlib.sha256(text.encode()).hexdigest()


def load(checkpoint: str | Path, attn_implementation: str, dtype: Any = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint (a hub name or a folder). `dtype`: of the weights, or "auto"."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=attn_implementation, dtype=dtype)
    return model.eval(), tokenizer


def check_device(device: str) -> torch.device:
    """The device; one line for a name that there is not."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"got {device!r} ({reason}), allowed: a device of this machine", param_hint="--device") from None


def check_dtype(dtype: str) -> Any:
    """The dtype that `load` takes; one line for another name."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"got {dtype!r}, allowed: {' | '.join(DTYPES)}", param_hint="--dtype")
    return DTYPES[dtype]


def cannot_load(what: str, error: Exception) -> typer.BadParameter:
    """One line for a checkpoint that cannot be loaded; a missing network is named as such."""
    if (said := network_error(error)) is not None:
        where = "without a network use the folder of a checkpoint"
        return typer.BadParameter(f"cannot reach the Hugging Face Hub for {what}: {said}; {where}", param_hint="MODEL")
    return typer.BadParameter(f"cannot load {what}: {' '.join(str(error).split())}", param_hint="MODEL")


def read_text(file: Path, option: str) -> str:
    """The text of the file that an option names; one line for a file that is missing, no text or empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {str(file)!r}: {error}", param_hint=option) from None
    if not text.strip():
        raise typer.BadParameter(f"{str(file)!r} is empty", param_hint=option)
    return text


def tokens_of(tokenizer: Any, text: str, file: Path, option: str) -> list[int]:
    """The token ids of a file's text, with those that the tokenizer puts around it; one line where there are none."""
    ids = tokenizer(text, verbose=False).input_ids
    if not ids:
        raise typer.BadParameter(f"{str(file)!r} holds no token for this model", param_hint=option)
    return ids


def check_length(tokens: int, ids: list[int], document: Path) -> None:
    """One line for a document of fewer tokens than are asked for."""
    if len(ids) < tokens:
        raise typer.BadParameter(f"--tokens: got {tokens}, allowed: at most the {len(ids)} of {document.name}")


def load_to_measure(model: str, device: str, text: str, dtype: str) -> tuple[Any, Any, list[int]]:
    """What a measuring command begins with: the model on its device, dense at first, its tokenizer, and the text's tokens.

    Raises:
        typer.BadParameter: there is no such device or dtype, or the model cannot be loaded.
    """
    where, weights = check_device(device), check_dtype(dtype)
    try:
        loaded, tokenizer = load(model, "sdpa", weights)
    except (OSError, ValueError) as error:
        raise cannot_load(repr(model), error) from None
    return loaded.to(where), tokenizer, tokenizer.encode(text, add_special_tokens=False, verbose=False)
