"""`hip-hf generate` and `hip-hf demo` end well with every method, and count the memory of what each
keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo_checkpoint
import pytest
from commands import run

from hip_hf import HiPCache, HiPConfig
from hip_hf.cli import demo
from hip_hf.cli import generate as command
from hip_hf.eval.measure import generate
from hip_hf.eval.measure.memory import cache_mib
from hip_hf.methods.base import summarises
from hip_hf.registry import METHODS

checkpoint, text = demo_checkpoint.checkpoint, demo_checkpoint.text  # fixtures


@pytest.mark.parametrize("method", METHODS)
def test_every_method(
    method: str, checkpoint: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Any] = []
    monkeypatch.setattr(
        generate, "HiPCache", lambda config: caches.append(HiPCache(config)) or caches[-1]
    )
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text.read_text()[:2000])
    setting = ("--set", f"method={method}")
    made = run(command.main, checkpoint, "--prompt-file", prompt, "--max-new-tokens", 3, *setting)
    assert made["memory_mib"]["cache"] == cache_mib(caches[0])
    pages = sum(layer.pool.bytes(layer.pool.used) for layer in caches[0].paged) / 2**20
    assert (made["memory_mib"]["cache"] > pages) == summarises(HiPConfig(method=method))

    monkeypatch.setattr(
        demo, "answer_in_own_process", demo.answer_alone
    )  # that demo starts processes is shown elsewhere
    given = (
        "--document",
        text,
        "--tokens",
        400,
        "--facts",
        1,
        "--picture",
        tmp_path / "demo.png",
        *setting,
    )
    shown = run(demo.main, "--checkpoint", checkpoint, *given)
    assert {row["method"] for row in shown["explain"]} == {method}
