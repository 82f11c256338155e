"""The real pretrained model of demos and tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock
from repository import ROOT

from hip_hf.eval.measure import real_model


def fetched() -> Path:
    """The model, in the working tree's `runs`: the first test that wants it fetches it there, and
    tests of other processes wait."""
    folder = ROOT / real_model.FOLDER
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        try:
            real_model.fetch(folder)
        except ConnectionError as error:
            if os.environ.get("CI"):  # where it must have run
                raise
            pytest.skip(str(error))
    return folder
