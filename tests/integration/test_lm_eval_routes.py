"""Every route to lm-eval knows all of its model types beside `hip`, each tried in a process that
has imported nothing before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval_cases
from lm_eval.models import MODEL_MAPPING
from lm_eval_cases import ENVIRONMENT
from repository import ROOT

from hip_hf.integration.lm_eval.registration import MODEL

hooked = lm_eval_cases.hooked  # a fixture

# What is asked for first decides what is loaded.
FIRST = f"""from lm_eval.api.registry import get_model
print(get_model('hf').__name__, get_model({MODEL!r}).__name__)"""
REGISTER = "from hip_hf.integration.lm_eval.registration import register; register(); register()\n"
TASKS = "import lm_eval.tasks\n"
COMMAND = "from hip_hf_cli import main; main()"
# lm-eval's error names the model types that it knows.
UNKNOWN = ["--model", "no-such-type", "--tasks", "hip_passkey", "--limit", "1"]


def process(env: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("route", "before"),
    [
        ("register", ""),
        ("register", "import lm_eval.models\n"),
        ("autoload", ""),
        ("autoload", TASKS),
    ],
)
def test_model_types_in_any_order(
    route: str, before: str, hooked: dict[str, str], tmp_path: Path
) -> None:
    env = hooked if route == "autoload" else {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = process(env, tmp_path, "-c", before + (REGISTER if route == "register" else "") + FIRST)
    assert done.stdout.split() == ["HFLM", "HipLM"], done.stderr[-2000:]


@pytest.mark.parametrize("route", ["hip-hf lm-eval", "lm_eval after autoload"])
def test_commands_know_every_model_type(route: str, hooked: dict[str, str], tmp_path: Path) -> None:
    if route == "hip-hf lm-eval":
        # without the frame that cuts the message into lines
        env = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            "_TYPER_STANDARD_TRACEBACK": "1",
        }
        done = process(env, tmp_path, "-c", COMMAND, "lm-eval", *UNKNOWN)
    else:
        done = process(hooked, tmp_path, "-m", "lm_eval", *UNKNOWN)
    (known,) = re.findall(r"Supported model names: ([^\n]*)", done.stderr)[-1:]
    assert {*MODEL_MAPPING, MODEL} <= set(known.split(", "))
