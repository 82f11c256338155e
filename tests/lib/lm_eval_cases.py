"""lm-eval through `hip`: models, commands, and fixtures that keep it from the network."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from typer.testing import CliRunner

from hip_hf.cli import autoload
from hip_hf.eval.measure.documents import CHECKPOINT
from hip_hf.integration.lm_eval.model import HipLM
from hip_hf_cli import app

# One thread: the tensors are so small that two would wait for each other.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# Sparse from the first token on, and little enough read that some answers are wrong.
SETTINGS = {
    "budget": 64,
    "window": 64,
    "sink": 16,
    "dense_below": 0,
    "dense_tail": 0,
    "dense_layers": 0,
}
# What each of several processes says at its very end: registered first, it is called last.
AT_EXIT = """
import atexit, os, sys
def end():
    import torch.distributed
    state = "open" if torch.distributed.is_initialized() else "closed"
    print("the group is", state, file=sys.stderr)
if "RANK" in os.environ:
    atexit.register(end)
"""


@pytest.fixture(autouse=True, scope="module")
def indexed_once() -> Iterator[None]:
    """Every command reads lm-eval's thousands of task files: here once for each folder."""
    from lm_eval.tasks.manager import TaskIndex

    build = functools.cache(TaskIndex.build)

    def copied(folders: list[Path]) -> dict[str, Any]:
        return copy.deepcopy(build(tuple(folders)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(copied))
        yield


@pytest.fixture(autouse=True, scope="module")
def offline_and_on_one_thread() -> Iterator[None]:
    """lm-eval asks the hub for a revision even of a local folder; and see `ENVIRONMENT`."""
    import huggingface_hub.constants

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
    torch.set_num_threads(before)


def make_lm(**arguments: Any) -> HipLM:
    return HipLM(**{"pretrained": str(CHECKPOINT), "device": "cpu", **SETTINGS, **arguments})


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose site folder holds what `hip-hf autoload enable` writes
    there."""
    site = tmp_path_factory.mktemp("site")
    for path, content in autoload.files().items():
        (site / path.name).write_text(content)
    # read as Python reads site-packages, in this process and its children
    (site / "sitecustomize.py").write_text(
        f"import site\nsite.addsitedir({str(site)!r})\n{AT_EXIT}"
    )
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


def command(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "400", "TERM": "dumb"}).invoke(app, ["lm-eval", *arguments])
