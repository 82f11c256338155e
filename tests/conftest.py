"""Fixtures: fixed seeds, and uninitialised memory that shows itself."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anything imports triton: kernel tests run without a GPU
    )

if (
    "PYTEST_XDIST_WORKER_COUNT" in os.environ
):  # the processes share the cores; tests of threads set their own number
    torch.set_num_threads(
        max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    )

from poison import spoil_fresh_memory

from hip_hf import workers
from hip_hf.backends.torch import dense, sparse
from hip_hf.backends.torch.decode_buffer import DecodeBuffer
from hip_hf.methods.hip import TreeSearch

# `tests/*/test_fuzz*.py` share the cases of a profile between their properties; other tests say how
# many they want
settings.register_profile(
    "ci", max_examples=400, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
many = dict(max_examples=100_000, derandomize=False, database=None, print_blob=True)
settings.register_profile("fuzz", settings.get_profile("ci"), **many)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families",
        default="0",
        help="model types to sweep: all, or the seed by which a third of them is drawn",
    )
    parser.addoption(
        "--races",
        type=int,
        help="seed: kernels run in a harsher interpreter (`tests/lib/sanitizer.py`)",
    )
    parser.addoption(
        "--tensor-cores",
        action="store_true",
        help="fp32 as NVIDIA GPUs compute it (`tests/lib/tensor_cores.py`)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A failed `assert` in what tests share says as much as one in a test. `sweep` also runs without
    # pytest and writes down what errors say, which must not depend on that.
    shared = {file.stem for file in (Path(__file__).parent / "lib").glob("*.py")}
    pytest.register_assert_rewrite(*(shared - {"sweep", *sys.modules}))
    seed = config.getoption("races")
    if seed is not None:
        from sanitizer import Plugin  # imports triton, which must know by now that it interprets

        config.pluginmanager.register(Plugin(seed))
    if config.getoption("tensor_cores"):
        from tensor_cores import Plugin as Emulating

        config.pluginmanager.register(Emulating())


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run of a test."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads, for this test only. One makes the backend work in the
    calling thread."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: Callable[[int], None]) -> None:
    """For modules whose tensors are small: waking threads would take most of the time."""
    threads(1)


def _over_spoilt_buffers(work: Callable[..., Any], in_use: str | None = None) -> Callable[..., Any]:
    @wraps(work)
    def done(*args: Any, **kwargs: Any) -> Any:
        for (name, *_), (buffer, _) in workers.scratch.buffers.items():  # of the thread that works
            if buffer.is_floating_point() and name != in_use:
                buffer.fill_(torch.nan)
        return work(*args, **kwargs)

    return done


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory and the workers' reused buffers hold NaN, so that nothing read before it is
    written goes unnoticed."""
    spoil_fresh_memory(monkeypatch)
    works = [(sparse, "attend_range"), (dense, "attend_range"), (sparse, "near_lse")]
    works += [(sparse.SparseAttention, "_near"), (DecodeBuffer, "fill"), (DecodeBuffer, "attend")]
    for owner, name in works:
        monkeypatch.setattr(owner, name, _over_spoilt_buffers(getattr(owner, name)))
    # the logits of sink and window wait in a buffer until the rest has been selected and read
    for owner, name in ((TreeSearch, "_search"), (sparse, "attend_blocks"), (sparse, "partial")):
        monkeypatch.setattr(owner, name, _over_spoilt_buffers(getattr(owner, name), in_use="near"))
