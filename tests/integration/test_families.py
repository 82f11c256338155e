"""Every causal-LM and encoder-decoder type of the installed Transformers, by the checks that the
documentation's table is of.

`--families all` (`make test-families`) runs all types; a number, which is the default, a third of
them, drawn with that seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version

import pytest
import sweep


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        names, chosen = sweep.names(), metafunc.config.getoption("families")
        if chosen != "all":
            names = sorted(random.Random(int(chosen)).sample(names, len(names) // 3))
        metafunc.parametrize("family", names, ids=[sweep.key(*name) for name in names])


@pytest.mark.filterwarnings("ignore")
def test_family(family: tuple[str, str], threads: Callable[[int], None]) -> None:
    """Equal to eager attention, refused, or impossible here; and as the documentation says, for the
    version that it is of."""
    threads(1)
    outcome = sweep.run(*family)
    assert outcome.kind != "differs", outcome
    record = sweep.read_record()
    if record["transformers"] == version("transformers"):
        assert asdict(outcome) == record["types"][sweep.key(*family)]


def test_the_record_is_of_all_types() -> None:
    record = sweep.read_record()
    if record["transformers"] == version("transformers"):
        assert list(record["types"]) == [sweep.key(*name) for name in sweep.names()]


def test_what_differs_is_found_and_said(
    monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    """The table is made of outcomes, not of names; and a limit that is none any more is a fault of
    the list."""
    threads(1)

    def fails(family: sweep.Family) -> None:
        raise AssertionError("off by 3\nand more")

    monkeypatch.setattr(
        sweep,
        "CHECKS",
        {"good": lambda family: None, "known": fails, "bad": fails, "mended": lambda family: None},
    )
    monkeypatch.setattr(
        sweep, "LIMITS", {("llama", "known"): "a reason", ("llama", "mended"): "none"}
    )
    outcome = sweep.run("causal", "llama")
    assert outcome.kind == "differs"
    assert outcome.checks["good"] == "yes"
    assert outcome.checks["known"] == "no: a reason"
    assert outcome.checks["bad"] == "differs: AssertionError: off by 3"
    assert outcome.checks["mended"].startswith("differs: it passes")
    page = sweep.page({"transformers": "5", "torch": "2", "types": {"llama": asdict(outcome)}})
    assert "| `llama` | yes | no (1) | differs (2) | differs (3) |" in page
    assert "1. a reason" in page
