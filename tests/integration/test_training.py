"""Fine-tuning through the sparse path with FSDP2 and with accelerate: the losses of several
processes are those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trained
from families import make_model
from processes import launch

# Losses as `Trainer` logs them, and sums in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("trained")
    launch(2, trained.__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one() -> list[float]:
    """The losses of a plain loop in this process."""
    found = trained.losses_of(make_model("llama"))
    assert found["paths"] == ["sparse", "sparse"]
    losses: list[float] = found["losses"]
    assert losses[-1] < losses[0] - 100 * TOLERANCE, "nothing was learnt"
    return losses


@pytest.mark.parametrize("way", ["fsdp", "trainer"])
def test_two_processes_have_the_losses_of_one(
    way: str, one: list[float], two: list[dict[str, Any]]
) -> None:
    for seen in two:
        assert seen[way]["losses"] == pytest.approx(one, abs=TOLERANCE)
        assert seen[way]["paths"] == ["sparse", "sparse"]
    assert two[0]["trainer"]["processes"] == 2
