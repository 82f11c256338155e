"""Every supported version of Transformers, PyTorch and Python together.

    pip install nox uv && nox           # the whole grid, and a table of what passed
    nox --list                          # the names of the sessions
    nox -k "3.12 and 2.11.0" -- tests   # one Python and PyTorch; pytest gets what follows `--`
    nox -s lent-3.12                    # the versions that a lent GPU comes with, together
    nox -s table                        # the table of what has been tried so far

A session makes an environment of one Python and one PyTorch and tries the versions of Transformers
in it, one after the other: all of them with the newest PyTorch, the newest of them with an older
one. The grid's tests (tests/versions/grid.txt) are a few that meet each border to Transformers,
PyTorch and Python; `-- $(cat tests/versions/files.txt)` runs more, `-- tests` all.

A session needs its Python to be installed, and fails without it. PyTorch is what the installer
finds: builds for CPUs, from an index that has them or a folder of wheels, save gigabytes. With `uv`
the environments share their files. Versions before 2.10 must be builds without CUDA: those with
CUDA insist on a Triton that is older than the 3.6 that we ask for.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import nox

nox.options.error_on_missing_interpreters = True
nox.options.default_venv_backend = "uv|virtualenv"

TESTS = Path("tests/versions/grid.txt").read_text().splitlines()
# Of Transformers, the oldest that serves, two between, and the newest, with the Pythons that each
# takes.
TRANSFORMERS = {"5.17.0": 10, "5.20.0": 10, "5.23.0": 11, "5.24.0": 11}
PYTHONS = range(10, 14)  # minor versions
TORCH = ("2.13.0", "2.11.0", "2.6.0")
NO_KERNELS = ("2.6.0",)  # belong to a Triton (3.2) that is too old for the kernels
REQUIRED = ("pytest", "hypothesis")
# The interpreter of this Triton does not take the arrays of newer numpy.
LENT = ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy<2.4")
RESULTS = Path("build/grid")


def result(python: str, transformers: str, torch: str) -> Path:
    return RESULTS / f"python-{python}-transformers-{transformers}-torch-{torch}.xml"


def count(tried: Path) -> str:
    """How many tests passed and how many did not; a dash for a run that has left no result."""
    if not tried.exists():
        return "-"
    suite = ElementTree.parse(tried).getroot()[0]
    number = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    passed = f"{number['tests'] - failed - number['skipped']} passed"
    return ", ".join(
        [
            passed,
            *(
                f"{number[name]} {name}"
                for name in ("failures", "errors", "skipped")
                if number[name]
            ),
        ]
    )


@nox.session
@nox.parametrize("python,torch", [(f"3.{python}", torch) for torch in TORCH for python in PYTHONS])
def grid(session: nox.Session, torch: str) -> None:
    """One Python and one PyTorch with each version of Transformers that they are tried with."""
    python = str(session.python)
    versions = [
        version for version, first in TRANSFORMERS.items() if int(python.partition(".")[2]) >= first
    ]
    kernels = "tests/backends/test_kernel"
    served = [test for test in TESTS if torch not in NO_KERNELS or not test.startswith(kernels)]
    tests = session.posargs or served
    session.install("-e", ".", *REQUIRED, f"torch=={torch}")
    failed = []
    for version in versions if torch == TORCH[0] else versions[-1:]:
        tried = result(python, version, torch)
        tried.unlink(missing_ok=True)
        session.install(f"transformers=={version}")
        try:
            session.run(
                "python", "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={tried}", *tests
            )
        except nox.command.CommandFailed:  # the other versions are tried all the same
            failed.append(version)
    if failed:
        session.error(f"failed with Transformers {', '.join(failed)}")


@nox.session(python=["3.11", "3.12"])
def lent(session: nox.Session) -> None:
    """All that `benchmarks/gpu_run.py` does, on a CPU with tiny shapes, with the versions that a
    lent GPU comes with."""
    session.install("-e", ".", *REQUIRED, *LENT)
    tests = session.posargs or ["tests/project/test_gpu_run.py"]
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *tests)


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """What passed and failed in the last run of each cell, as a table in Markdown."""
    pythons = [f"3.{python}" for python in PYTHONS]
    print("| Transformers | PyTorch |", *(f"Python {python} |" for python in pythons))
    print("|---|---|" + "---|" * len(pythons))
    for torch in TORCH:
        for version in TRANSFORMERS:
            cells = [count(result(python, version, torch)) for python in pythons]
            if set(cells) != {"-"}:
                print(f"| {version} | {torch} |", *(f"{cell} |" for cell in cells))
