"""`hip_hf.unregister` leaves Transformers as it was: looked at in a process of its own, before and
after `hip_hf` is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from repository import LIB, ROOT

SCRIPT = Path(__file__)
TWICE = 2  # register and unregister are harmless a second time


def owners() -> dict[str, Any]:
    """What `hip_hf` changes something of, by a name, and its server besides where that can be
    imported."""
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        DynamicCache,
        PreTrainedModel,
        cache_utils,
    )
    from transformers.cli.serving import model_manager, server, utils
    from transformers.generation.continuous_batching import continuous_api

    classes = [
        DynamicCache,
        PreTrainedModel,
        cache_utils.Cache,
        model_manager.ModelManager,
        utils.GenerateManager,
    ]
    classes += [
        utils.CBGenerateManager,
        continuous_api.ContinuousBatchingManager,
        continuous_api.PagedAttentionCache,
    ]
    tables = {
        "attentions": AttentionInterface._global_mapping,
        "masks": AttentionMaskInterface._global_mapping,
        "static layers": cache_utils.STATIC_LAYER_TYPE_MAPPING,
    }
    return {**{owner.__name__: vars(owner) for owner in classes}, "server": vars(server), **tables}


def state() -> dict[str, Any]:
    return {
        f"{owner}.{name}": value
        for owner, fields in owners().items()
        for name, value in fields.items()
    }


def changed(before: dict[str, Any]) -> list[str]:
    """Names of what is not what it was."""
    now = state()
    return sorted(name for name in before.keys() | now if before.get(name) is not now.get(name))


def main() -> None:
    """Print what differs from the beginning: after everything was registered, after it was taken
    back, and the same again."""
    from transformers import DynamicCache, LlamaConfig

    before, found = state(), {}
    import torch
    from families import make_model

    import hip_hf
    from hip_hf.eval.measure.capture import capture
    from hip_hf.integration import serve

    model = make_model("llama", "sdpa")
    for turn in range(TWICE):
        hip_hf.register()
        serve.register()
        serve.limit_lengths(100)
        serve.after_loading(print)
        serve.explain_failures()
        capture(model, torch.ones(1, 8, dtype=torch.long))
        found[f"registered {turn}"] = changed(before)
        for _ in range(TWICE):
            hip_hf.unregister()
        found[f"unregistered {turn}"] = changed(before)
    found["caches"] = [
        type(DynamicCache(config=LlamaConfig())).__name__,
        type(DynamicCache()).__name__,
    ]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    pytest.importorskip("fastapi")
    path = os.pathsep.join([str(ROOT), str(LIB), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("turn", range(TWICE))
def test_all_that_was_changed_is_taken_back(found: dict[str, list[str]], turn: int) -> None:
    wanted = {"DynamicCache.__new__", "PreTrainedModel.post_init", "attentions.hip", "masks.hip"}
    wanted |= {"PreTrainedModel.set_attn_implementation", "static layers.full_attention"}
    wanted |= {"ContinuousBatchingManager.switch_to_cb_friendly_attn", "PagedAttentionCache.update"}
    wanted |= {"ModelManager._validate_args", "ModelManager._load_model", "server.build_server"}
    wanted |= {"CBGenerateManager.generate_streaming"}
    wanted |= {"attentions.hip_capture", "masks.hip_capture"}
    assert wanted <= {*found[f"registered {turn}"]}
    assert found[f"unregistered {turn}"] == ["DynamicCache.__new__"]  # which cannot be deleted


def test_caches_can_be_made_as_before(found: dict[str, list[str]]) -> None:
    assert found["caches"] == ["DynamicCache", "DynamicCache"]


def test_patched_layers_get_their_forwards_back() -> None:
    """Of every model of the process; patching works again afterwards."""
    import torch
    from families import make_model

    import hip_hf

    models = [make_model("llama", budget=64), make_model("qwen3", budget=64)]
    try:
        for model in models:
            hip_hf.patch(model)
        hip_hf.unregister()
        for model in models:
            assert not any("forward" in layer.__dict__ for layer in model.modules())
    finally:
        hip_hf.register()
    hip_hf.patch(models[0])
    with torch.no_grad():
        models[0](torch.randint(9, 90, (1, 90)))
    assert [row.path for row in hip_hf.explain(models[0])] == ["sparse", "sparse"]


def test_lm_eval_forgets_the_model_type_and_the_tasks() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import model_registry
    from lm_eval.tasks import TaskManager

    import hip_hf
    from hip_hf.integration.lm_eval import registration

    plain = TaskManager.__init__
    try:
        for _ in range(TWICE):
            registration.register()
            assert TaskManager.__init__ is not plain
            assert registration.MODEL in model_registry
            hip_hf.unregister()
            assert TaskManager.__init__ is plain
            assert registration.MODEL not in model_registry
    finally:
        hip_hf.register()


def test_finders_of_autoload_that_still_wait_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    import hip_hf
    from hip_hf.cli import autoload
    from hip_hf.integration import changes

    before = list(sys.meta_path)
    monkeypatch.setattr(sys, "meta_path", list(before))
    exec(autoload.SOURCE, {"__name__": changes.AUTOLOAD, "__file__": "somewhere"})
    assert len(sys.meta_path) == len(before) + 3
    try:
        hip_hf.unregister()
        assert sys.meta_path == before
    finally:
        hip_hf.register()


def test_what_somebody_has_wrapped_since_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from hip_hf.integration import changes

    monkeypatch.setattr(changes, "_undo", [])
    theirs = SimpleNamespace(wrapped=1, kept=1)
    for name in ("wrapped", "kept", "new"):
        changes.set_attribute(theirs, name, 2)
    table = {"wrapped": 1, "kept": 1}
    for name in ("wrapped", "kept", "new"):
        changes.set_item(table, name, 2)
    theirs.wrapped = table["wrapped"] = 3
    changes.undo()
    assert vars(theirs) == table == {"wrapped": 3, "kept": 1}


def test_every_file_that_changes_something_is_on_the_page() -> None:
    """In Transformers, lm-eval or Python's import system."""
    changing = re.compile(
        r"\b(?:at_undo|set_attribute|set_item|wrap)\(|meta_path|Interface\.register"
    )
    page = (ROOT / "docs" / "monkey_patches.md").read_text(encoding="utf-8")
    package = ROOT / "hip_hf"
    files = [file for file in package.rglob("*.py") if changing.search(file.read_text("utf-8"))]
    names = {file.relative_to(package).as_posix() for file in files} - {"integration/changes.py"}
    assert len(names) > 5
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


if __name__ == "__main__":
    main()
