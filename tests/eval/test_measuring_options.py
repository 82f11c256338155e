"""What all measuring commands take alike: device, dtype, and models that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from commands import SMALL, refused, run, save_checkpoint

from hip_hf.cli import compare, fidelity, memory, needles, passkey, perplexity
from hip_hf.eval.measure import documents

SETTINGS = ["--settings", json.dumps(SMALL)]
# Each with the smallest request.
COMMANDS: dict[str, tuple[Any, list[str]]] = {
    "passkey": (passkey, ["--lengths", "200", "--depths", "1", "--samples", "1", *SETTINGS]),
    "needles": (needles, ["--lengths", "300", "--prompts", "1", "--facts", "1", *SETTINGS]),
    "perplexity": (perplexity, ["--tokens", "256", "--texts", "1", *SETTINGS]),
    "fidelity": (fidelity, ["--tokens", "256", "--facts", "1", "--prompts", "1", *SETTINGS]),
    "compare": (
        compare,
        ["--tokens", "256", "--measures", "perplexity", "--prompts", "1", *SETTINGS],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "option",
    [
        ("--device", "nonsense"),
        pytest.param(
            ("--device", "cuda"),
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="there is such a device here"
            ),
        ),
        ("--dtype", "fp8"),
    ],
)
def test_what_there_is_not_is_refused_before_the_model_loads(
    name: str, option: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(documents, "load", load)
    command, arguments = COMMANDS[name]
    said = refused(command.main, *arguments, *option)
    assert option[0] in said
    assert f"got {option[1]!r}" in said


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("given", "dtype"), [((), torch.float32), (("--dtype", "bf16"), torch.bfloat16)]
)
def test_the_model_is_measured_in_the_dtype_given(
    name: str,
    given: tuple[str, ...],
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: Any,
) -> None:
    threads(1)
    model, text = save_checkpoint(tmp_path)
    loaded, load = [], documents.load
    monkeypatch.setattr(documents, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    command, arguments = COMMANDS[name]
    document = "--documents" if command is needles else "--document"
    printed = run(command.main, model, document, text, *arguments, *given)
    ((net, _),) = loaded
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert printed["dtype"] == (given[1] if given else "fp32")
    assert printed["rows"]


@pytest.mark.parametrize("name", [*COMMANDS, "memory"])
def test_a_hub_name_without_a_network_takes_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    command, arguments = {**COMMANDS, "memory": (memory, [])}[name]
    said = refused(command.main, "someone/some-checkpoint", *arguments)
    assert "cannot reach the Hugging Face Hub for 'someone/some-checkpoint'" in said
    assert "use the folder of a checkpoint" in said


def test_other_reasons_are_told_as_they_are(tmp_path: Path) -> None:
    said = refused(perplexity.main, str(tmp_path), *COMMANDS["perplexity"][1])
    assert f"cannot load {str(tmp_path)!r}" in said
    assert "network" not in said
