"""lm-eval's hub benchmarks without a network: one clear line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import datasets.config
import huggingface_hub.constants
import lm_eval_cases
import lm_eval_ruler
from lm_eval_cases import command

from hip_hf.eval.measure.documents import CHECKPOINT

indexed_once, theirs = lm_eval_cases.indexed_once, lm_eval_ruler.theirs  # fixtures


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused at once instead of tried again and again; and nothing was downloaded before."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(sys, "argv", [])


def check_one_line(*arguments: str) -> None:
    done = command(*arguments, "--model_args", f"pretrained={CHECKPOINT}", "--device", "cpu")
    assert isinstance(done.exception, SystemExit), done.exception
    said = str(done.exception.code)
    assert said.startswith("hip-hf lm-eval: cannot reach the Hugging Face Hub: ")
    assert "\n" not in said
    assert "--tasks hip_longctx" in said


@pytest.mark.parametrize("preset", ["longbench2", "infinitebench", "babilong"])
def test_no_network_is_one_line(preset: str) -> None:
    check_one_line("--preset", preset)


@pytest.mark.parametrize("preset", ["longbench", "longbench-e"])
def test_longbench(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores need packages that few have; stand-ins are enough to get to the hub."""
    for name, content in (
        ("jieba", {}),
        ("fuzzywuzzy", {"fuzz": None}),
        ("rouge", {"Rouge": None}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    check_one_line("--preset", preset)


def test_ruler(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own prompts are made here; the essays that some of them hide in come from the hub."""
    from lm_eval.tasks.ruler import prepare_niah

    make = prepare_niah.generate_samples
    monkeypatch.setattr(
        prepare_niah, "generate_samples", lambda *a, **k: make(*a, **{**k, "num_samples": 2})
    )
    check_one_line("--preset", "ruler", "--metadata", "max_seq_lengths=[1024]")
