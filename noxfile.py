"""Every supported version of Transformers, PyTorch and Python, each in an environment of its own.

    pip install nox && nox            # the whole grid: gigabytes and hours; `nox --list` names the sessions
    nox -k 5.17.0 -- tests            # one version; what follows `--` goes to pytest in place of the files below

A session needs its Python to be installed, and fails without it. PyTorch is what pip finds; versions before 2.10 must be builds
without CUDA, whose Triton is older than 3.6. On a machine without a GPU
`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` and a version like 2.13.0+cpu save gigabytes.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = True

# The tests that meet Transformers: models, caches, continuous batching, patched layers.
FILES = Path("tests/versions/files.txt").read_text().split()
# Of Transformers, the oldest that serves, two between, and the newest, with the Pythons that each takes.
TRANSFORMERS = {"5.17.0": 10, "5.20.0": 10, "5.23.0": 11, "5.24.0": 11}
PYTHONS = range(10, 14)  # minor versions
TORCH = ("2.6.0", "2.11.0", "2.13.0")
REQUIRED = ("pytest", "hypothesis")


def check(session: nox.Session, transformers: str, torch: str) -> None:
    session.install("-e", ".", *REQUIRED, f"transformers=={transformers}", f"torch=={torch}")
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *(session.posargs or FILES))


@nox.session
@nox.parametrize("python,transformers", [(f"3.{p}", t) for t, first in TRANSFORMERS.items() for p in PYTHONS if p >= first])
def transformers(session: nox.Session, transformers: str) -> None:
    """Each version of Transformers with each Python that it takes."""
    check(session, transformers, TORCH[-1])


@nox.session
@nox.parametrize("python,torch", [(f"3.{p}", t) for t in TORCH for p in PYTHONS])
def torch(session: nox.Session, torch: str) -> None:
    """Each version of PyTorch with each Python, and the newest Transformers that this Python takes."""
    newest = [version for version, first in TRANSFORMERS.items() if session.python >= f"3.{first}"][-1]
    check(session, newest, torch)
